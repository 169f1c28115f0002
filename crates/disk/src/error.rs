//! What goes wrong with images on disk.

use std::io;
use std::path::{Path, PathBuf};

use godwit_types::{Code, CodedError};

use crate::bitmap::BitmapError;
use crate::image::Qcow2Error;

/// A failed action on an image.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused.
    #[error("{doing} {} failed", path.display())]
    Io {
        /// What was being done, e.g. "reading".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file system or the quota is full.
    #[error("no room left while {doing} {}: free some space on its file system and try again", path.display())]
    NoRoom {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `qemu-img` failed.
    #[error("qemu-img {verb} {} failed: {said}", path.display())]
    Tool {
        /// The subcommand.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The last of what it wrote to its error output.
        said: String,
    },
    /// A qcow2 file must not be used.
    #[error("the qcow2 image {} was refused", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Qcow2Error,
    },
    /// A raw base or a chain is unusable.
    #[error("the image {} was refused: {why}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// A file name can't be given to QEMU.
    #[error("the path {} was refused: {why}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// A block doesn't match its hash.
    #[error("block {block} of {} does not match its hash", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The block.
        block: u64,
    },
    /// The file beside a middle layer that tells what was received is damaged.
    #[error("the record of received blocks {} is damaged", path.display())]
    Record {
        /// The file.
        path: PathBuf,
    },
    /// The disk is too large for a bitmap.
    #[error("the disk of {} can't be mapped", path.display())]
    Bitmap {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BitmapError,
    },
    /// Whoever supplied the blocks of a new image failed.
    #[error("the blocks for {} could not be had", path.display())]
    Supply {
        /// The new image.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl CodedError for DiskError {
    fn code(&self) -> Code {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NotFound,
            Self::Io { .. } | Self::Tool { .. } => Code::Internal,
            Self::NoRoom { .. } => Code::NoRoom,
            Self::Refused { .. } | Self::Unfit { .. } | Self::Path { .. } => Code::Invalid,
            Self::Damaged { .. } | Self::Record { .. } => Code::Damaged,
            Self::Bitmap { source, .. } => source.code(),
            Self::Supply { .. } => Code::Internal,
        }
    }
}

/// Says what was being done to which file; a full disk gets its own error.
pub(crate) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_path_buf();
    move |source| {
        let full = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        );
        if full {
            DiskError::NoRoom { doing, path, source }
        } else {
            DiskError::Io { doing, path, source }
        }
    }
}
