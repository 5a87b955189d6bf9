from r2d2fast.train import pictures


def test_the_test_error_is_a_line_through_the_epochs_that_measured_it(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_picture", lambda figure, path: drawn.append(figure))
    errors = [None, 40.0, None, 20.0]
    pictures.draw_curves(
        tmp_path,
        [{"stage": 1, "test_error": error, "pseudo_label_error": None, "repredicted": False} for error in errors],
        "r2d2",
    )
    ((axis,),) = (figure.axes for figure in drawn)
    (line,) = axis.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4], [40.0, 20.0])
