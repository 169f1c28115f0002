//! Base and cow images, NBD, and the disk side of post-copy.
