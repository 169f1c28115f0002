//! How far a build is.

use serde::Serialize;

/// What a build is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Waiting for another build that uses the same cache.
    Waiting,
    /// Finding out which packages are needed and in which version.
    Resolving,
    /// Fetching packages.
    Downloading,
    /// Unpacking and installing packages.
    Installing,
    /// Compiling the guest's own tools.
    Compiling,
    /// Writing kernel, initial RAM disk and disk.
    Writing,
    /// Hashing and publishing.
    Publishing,
    /// The image is there.
    Done,
}

impl Stage {
    /// The word for people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Resolving => "resolving",
            Self::Downloading => "downloading",
            Self::Installing => "installing",
            Self::Compiling => "compiling",
            Self::Writing => "writing",
            Self::Publishing => "publishing",
            Self::Done => "done",
        }
    }
}

/// One report of a build.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// How much of this stage is done, 0 to 1, where that is known.
    pub fraction: Option<f32>,
    /// What is being done right now, for people; one line.
    pub note: String,
}

/// Who is told.
pub(crate) type Listener<'a> = &'a (dyn Fn(Progress) + Send + Sync);

pub(crate) fn report(
    to: Listener<'_>,
    stage: Stage,
    fraction: Option<f32>,
    note: impl Into<String>,
) {
    to(Progress { stage, fraction, note: note.into() });
}
