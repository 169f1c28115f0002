//! Which kernel the machines run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

/// The script that fetches a kernel; it travels in the program, which so needs no source tree.
const FETCH: &str = include_str!("../../../scripts/kernel");

/// A kernel to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    image: PathBuf,
    release: String,
}

impl Kernel {
    /// The newest kernel that is kept; the newest of Debian's backports, fetched now, if none is.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] with what is missing: the way to a mirror, a directory to write to.
    pub fn find() -> Result<Self, Error> {
        let mut script = Command::new("bash")
            .args(["-s", "kernel"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io("starting bash for scripts/kernel"))?;
        if let Some(mut stdin) = script.stdin.take() {
            stdin.write_all(FETCH.as_bytes()).map_err(Error::io("writing to bash"))?;
        }
        let output = script.wait_with_output().map_err(Error::io("waiting for scripts/kernel"))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            let last = why.lines().last().unwrap_or("scripts/kernel failed without a word");
            return Err(Error::Kernel(last.to_owned()));
        }
        Self::at(Path::new(String::from_utf8_lossy(&output.stdout).trim()))
    }

    /// The kernel whose `vmlinuz` is in `directory`, which is named after its release.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] if there is none.
    pub fn at(directory: &Path) -> Result<Self, Error> {
        let image = directory.join("vmlinuz");
        if !image.is_file() {
            return Err(Error::Kernel(format!("{} is no file", image.display())));
        }
        let release = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { image, release })
    }

    /// The image that QEMU loads.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// What `uname -r` says in the guest, such as `6.18.12+deb13-cloud-amd64`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }
}
