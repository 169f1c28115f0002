//! Network namespaces made with `ip netns`, and the records by which a later start finds those
//! that a killed emulator left behind.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::task::{Context, Poll};

use godwit_types::Name;
use rustix::fs::{FlockOperation, flock};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{LinkError, Side};

const RECORDS: &str = "/run/godwit/links";

pub(super) fn ip(args: &[&str]) -> Result<(), LinkError> {
    let out = Command::new("ip")
        .args(args)
        .output()
        .map_err(|e| LinkError::system("run the `ip` tool (package iproute2)", e))?;
    if out.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&out.stderr).trim().chars().take(300).collect();
    Err(LinkError::Ip { args: args.join(" "), stderr })
}

/// The name of the namespace on `side` of the link `name`.
pub(super) fn ns_name(name: &Name, side: Side) -> String {
    format!("gw-{name}-{}", if side == Side::A { 'a' } else { 'b' })
}

fn ns_path(ns: &str) -> PathBuf {
    Path::new("/run/netns").join(ns)
}

/// Runs `f` on a thread of its own inside the namespace `ns`. Sockets that it opens and
/// processes that it starts belong to the namespace.
pub(super) fn enter<T: Send>(ns: &str, f: impl FnOnce() -> T + Send) -> Result<T, LinkError> {
    let open = |p: &Path| {
        File::open(p).map_err(|e| LinkError::system(format!("open namespace {}", p.display()), e))
    };
    let target = open(&ns_path(ns))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(target.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|e| LinkError::system(format!("enter the namespace {ns}"), e))?;
            Ok(f())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A future that is inside a namespace whenever it runs, so that processes and sockets it makes
/// belong there. What it spawns as tasks of their own is outside.
#[derive(Debug)]
pub struct Within<F> {
    target: File,
    home: File,
    future: Pin<Box<F>>,
}

impl<F> Within<F> {
    pub(super) fn new(ns: &str, future: F) -> Result<Self, LinkError> {
        let open = |p: &Path| {
            File::open(p).map_err(|e| LinkError::system(format!("open {}", p.display()), e))
        };
        let target = open(&ns_path(ns))?;
        let home = open(Path::new("/proc/self/ns/net"))?;
        Ok(Self { target, home, future: Box::pin(future) })
    }
}

impl<F: Future> Future for Within<F> {
    type Output = Result<F::Output, LinkError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let net = Some(LinkNameSpaceType::Network);
        if let Err(e) = move_into_link_name_space(self.target.as_fd(), net) {
            return Poll::Ready(Err(LinkError::system("enter the namespace", e)));
        }
        let done = self.future.as_mut().poll(cx);
        if let Err(e) = move_into_link_name_space(self.home.as_fd(), net) {
            return Poll::Ready(Err(LinkError::system("leave the namespace", e)));
        }
        done.map(Ok)
    }
}

/// A lock on a link's name, held while the link is up. The kernel lets go of it when the process
/// ends, however it ends.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    _lock: File,
}

impl Record {
    /// Takes the name, after clearing what a dead owner left behind.
    pub(super) fn take(name: &Name) -> Result<Self, LinkError> {
        fs::create_dir_all(RECORDS)
            .map_err(|e| LinkError::system(format!("make the directory {RECORDS}"), e))?;
        let path = Path::new(RECORDS).join(name.as_str());
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(|e| LinkError::system(format!("open {}", path.display()), e))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(LinkError::Busy(name.to_string()));
                }
                Err(e) => return Err(LinkError::system(format!("lock {}", path.display()), e)),
            }
            // The last owner may have removed the file between our open and our lock.
            let ours = file.metadata().map(|m| m.ino());
            let there = fs::metadata(&path).map(|m| m.ino());
            if matches!((ours, there), (Ok(a), Ok(b)) if a == b) {
                let record = Self { path, _lock: file };
                remove_namespaces(name)?;
                return Ok(record);
            }
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "could not remove the link's record: {e}");
        }
    }
}

/// Removes both namespaces of `name`, if they are there.
pub(super) fn remove_namespaces(name: &Name) -> Result<(), LinkError> {
    for side in Side::BOTH {
        let ns = ns_name(name, side);
        if ns_path(&ns).exists() {
            ip(&["netns", "del", &ns])?;
        }
    }
    Ok(())
}

/// Clears what emulators that were killed left behind: their namespaces and records. Links that
/// are up stay up. Gives the names of the links cleared.
///
/// # Errors
/// [`LinkError`] when the directory of records cannot be read; a link that cannot be cleared is
/// logged and left.
pub fn sweep() -> Result<Vec<Name>, LinkError> {
    let entries = match fs::read_dir(RECORDS) {
        Ok(e) => e,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(LinkError::system(format!("list {RECORDS}"), e)),
    };
    let mut cleared = Vec::new();
    for entry in entries.flatten() {
        let Some(name) = entry.file_name().to_str().and_then(|n| Name::new(n).ok()) else {
            continue;
        };
        match Record::take(&name) {
            Ok(_record) => cleared.push(name),
            Err(LinkError::Busy(_)) => {}
            Err(e) => tracing::warn!(link = %name, "could not clear a dead link: {e}"),
        }
    }
    Ok(cleared)
}
