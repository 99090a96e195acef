"""Other libraries that give a trainer its samples, one file each, used as their documentation says.

A file holds `PACKAGE`, the name to install it by, and `readers(material, folder, batch) -> list[Reader]`, which may
write the library's own format into `folder`. The library is imported inside.
"""
