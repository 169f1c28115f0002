//! What can go wrong with images.

use std::io;
use std::path::PathBuf;

use godwit_types::{Code, CodedError, Hash, Name};

/// A failure to build, find or check an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such recipe, so nothing to build from.
    #[error("no recipe for image '{name}'; there are: {known}")]
    NoRecipe {
        /// The name asked for.
        name: Name,
        /// The names that exist, separated by commas.
        known: String,
    },
    /// The image was not built yet.
    #[error("image '{name}' has not been built")]
    NotBuilt {
        /// The name asked for.
        name: Name,
    },
    /// A recipe that cannot be used.
    #[error("recipe '{name}' cannot be used: {why}")]
    Recipe {
        /// The recipe.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file or directory could not be read or written.
    #[error("{doing} {path}", path = .path.display())]
    Io {
        /// What was being done, such as 'reading'.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// An `image.json` that is not one.
    #[error("{path} does not describe an image: {why}", path = .path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file of an image does not match its description.
    #[error("{path} is damaged: its content hash is {found}, {wanted} is wanted", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Hash of what is there.
        found: Hash,
        /// Hash in the description.
        wanted: Hash,
    },
    /// A tool of the host is missing.
    #[error(
        "{tool} is not installed; Debian has it in package {package}: apt-get install {package}"
    )]
    ToolMissing {
        /// The program.
        tool: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
    },
    /// A tool of the host failed.
    #[error("{tool} failed while {doing} ({status}): {stderr}")]
    ToolFailed {
        /// The program.
        tool: String,
        /// What it was to do.
        doing: String,
        /// Exit status or signal.
        status: String,
        /// The last lines that it printed.
        stderr: String,
    },
    /// A package that no configured mirror has.
    #[error("package {package} not found: no configured apt source has it for {arch} in {suite}")]
    PackageNotFound {
        /// The package.
        package: String,
        /// Debian's name of the architecture.
        arch: String,
        /// The suites that were searched.
        suite: String,
    },
    /// The machine's apt configuration names no source of the wanted Debian release.
    #[error(
        "no apt source for Debian {suite} in /etc/apt; images are built from the machine's own sources"
    )]
    NoAptSource {
        /// The release.
        suite: String,
    },
    /// A file in a package is not what it should be.
    #[error("{what}: {why}")]
    Package {
        /// The file or package.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The cache is being changed by somebody else.
    #[error("an image is being built in {dir}", dir = .dir.display())]
    Busy {
        /// The cache.
        dir: PathBuf,
    },
    /// Building a root file system needs root.
    #[error("building '{name}' installs packages into a root file system and needs root")]
    NeedsRoot {
        /// The image.
        name: Name,
    },
}

impl ImageError {
    pub(crate) fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}

impl CodedError for ImageError {
    fn code(&self) -> Code {
        match self {
            Self::NoRecipe { .. } | Self::NotBuilt { .. } => Code::NotFound,
            Self::Recipe { .. } | Self::NeedsRoot { .. } => Code::Invalid,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::NoRoom,
                io::ErrorKind::NotFound => Code::NotFound,
                _ => Code::Internal,
            },
            Self::Description { .. } | Self::Damaged { .. } | Self::Package { .. } => Code::Damaged,
            Self::ToolMissing { .. } | Self::PackageNotFound { .. } | Self::NoAptSource { .. } => {
                Code::Unavailable
            }
            Self::ToolFailed { .. } => Code::Internal,
            Self::Busy { .. } => Code::Conflict,
        }
    }
}
