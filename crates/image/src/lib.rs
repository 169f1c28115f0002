//! Guest images built from Debian packages.
//!
//! A *recipe* (`guests/<name>/recipe.toml`, embedded in the library) says which packages, files and
//! settings make an image. [`ImageCache::build`] turns it into an [`Image`]: a kernel, an initial
//! RAM disk and a raw ext4 disk, booted directly by QEMU. Packages come from the mirrors that the
//! machine's own apt is configured for.
//!
//! ```text
//! recipe --apt--> packages --unpack/mmdebstrap--> files --cpio, mke2fs -d--> by-hash/<hash>/
//!                                                                 <name> -> by-hash/<hash>
//! ```
//!
//! An image is never changed after it was published: a new build gets a new directory, and the
//! name moves over in one rename.

mod apt;
mod cache;
mod cpio;
mod disk;
mod elf;
mod error;
mod guests;
mod image;
mod initramfs;
mod kernel;
mod module;
mod progress;
mod recipe;
mod rootfs;
mod tool;

pub use cache::{DEFAULT_CACHE, ImageCache};
pub use error::ImageError;
pub use image::{FileRef, Image};
pub use progress::{Progress, Stage};
pub use recipe::{Kind, Recipe};
