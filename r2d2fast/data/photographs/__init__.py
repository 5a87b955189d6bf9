"""Photographs: files of any size on the disk, decoded and cropped batch by batch while training goes on."""
