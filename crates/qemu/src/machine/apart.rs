//! Files and sockets that a confined QEMU and this process share.
//!
//! A QEMU that is not confined opens each path by itself. A confined one makes its files where it
//! may, and they are moved to their place, where it can't put anything else; what it reads is
//! copied to where it sees it.

use std::path::{Path, PathBuf};

use super::Machine;
use crate::confine;
use crate::error::QemuError;

/// A place where QEMU makes something that belongs elsewhere.
pub(super) struct Place {
    /// The path that QEMU is given.
    pub(super) qemu_path: PathBuf,
    /// Where it belongs, when that is another path.
    belongs: Option<(PathBuf, u32)>,
}

impl Place {
    /// Moves the socket that QEMU has made to where it belongs, and lets the program connect to it
    /// that QEMU meets there.
    pub(super) fn take_socket(&self) -> Result<(), QemuError> {
        match &self.belongs {
            Some((path, uid)) => {
                confine::take_socket(&self.qemu_path, path, *uid)?;
                confine::share_socket(path)
            }
            None => confine::share_socket(&self.qemu_path),
        }
    }

    /// Moves the file that QEMU has written to where it belongs, as a file of ours.
    pub(super) fn take_file(&self) -> Result<(), QemuError> {
        let Some((path, _)) = &self.belongs else { return Ok(()) };
        let (me, group) = (rustix::process::geteuid(), rustix::process::getegid());
        let moved =
            std::os::unix::fs::lchown(&self.qemu_path, Some(me.as_raw()), Some(group.as_raw()))
                .and_then(|()| match std::fs::rename(&self.qemu_path, path) {
                    // Another file system: states are small there.
                    Err(e) if e.kind() == std::io::ErrorKind::CrossesDevices => {
                        std::fs::copy(&self.qemu_path, path).map(drop)?;
                        std::fs::remove_file(&self.qemu_path)
                    }
                    done => done,
                });
        moved.map_err(QemuError::file("taking what QEMU wrote for", path))
    }

    /// Removes what QEMU has left or was given there.
    pub(super) fn clear(&self) {
        if self.belongs.is_some() {
            // A scratch file that stays is removed at the next use of its name.
            let _ = std::fs::remove_file(&self.qemu_path);
        }
    }
}

impl Machine {
    /// The uid of its own, if it is confined.
    #[must_use]
    pub fn user(&self) -> Option<u32> {
        self.launched().user
    }

    /// Lets QEMU connect to a socket that is not its own. One that is not confined may anyway.
    ///
    /// # Errors
    /// When there is none at `path`.
    pub fn let_connect(&self, path: &Path) -> Result<(), QemuError> {
        self.user().map_or(Ok(()), |uid| confine::open_socket(path, uid))
    }

    pub(super) fn let_read(&self, path: &Path) -> Result<(), QemuError> {
        self.user().map_or(Ok(()), |uid| confine::let_read(path, uid))
    }

    /// Where QEMU is to listen so that it can be reached at `path`.
    pub(super) fn socket_place(&self, path: &Path) -> Result<Place, QemuError> {
        let Some(uid) = self.user() else {
            return Ok(Place { qemu_path: path.to_owned(), belongs: None });
        };
        if let Some(dir) = path.parent() {
            confine::open_dir(dir, uid)?;
        }
        // QEMU sees the directory under the name that it has now. The name of the socket is new: QEMU
        // removes it when it stops listening, and there may be another one by then.
        let name = uuid::Uuid::new_v4().simple().to_string();
        let qemu_path = self.paths().made(&name[..8]);
        Ok(Place { qemu_path, belongs: Some((path.to_owned(), uid)) })
    }

    /// A file in the scratch directory for something that is to be at `path`, QEMU's own and empty.
    pub(super) fn file_place(&self, path: &Path) -> Result<Place, QemuError> {
        let launch = self.launch();
        let (Some(confine), Some(uid)) = (&launch.confine, launch.user) else {
            return Ok(Place { qemu_path: path.to_owned(), belongs: None });
        };
        let qemu_path = confine.scratch.join(uid.to_string());
        let _ = std::fs::remove_file(&qemu_path);
        confine::make_file(&qemu_path, uid)?;
        Ok(Place { qemu_path, belongs: Some((path.to_owned(), uid)) })
    }

    /// A copy of the file at `path` where QEMU can read it.
    pub(super) fn copy_place(&self, path: &Path) -> Result<Place, QemuError> {
        let place = self.file_place(path)?;
        if place.belongs.is_some() {
            let copied = std::fs::File::open(path).and_then(|mut from| {
                let mut to = std::fs::OpenOptions::new().write(true).open(&place.qemu_path)?;
                std::io::copy(&mut from, &mut to)
            });
            if let Err(e) = copied {
                place.clear();
                return Err(QemuError::file("copying", path)(e));
            }
        }
        Ok(place)
    }

    /// Moves the socket of the display to its place, before the guest runs.
    pub(super) fn take_display(&self) -> Result<(), QemuError> {
        let launch = self.launch();
        match launch.user {
            Some(uid) if launch.spec.display => {
                let paths = self.paths();
                confine::take_socket(&paths.vnc_made, &paths.vnc, uid)
            }
            _ => Ok(()),
        }
    }
}
