//! A QEMU under a uid of its own that sees nothing but what is its machine's; and so the programs
//! that work beside it ([`crate::Companion`]).
//!
//! ```text
//! one lock a host ---+                                  +--- until the exec is done
//!                    v                                  v
//! claim a uid --> files to that uid --> fork --> group, own mounts, uid --> exec
//! ```
//!
//! In its mount namespace are the programs (read-only), its machine's files at the paths that they
//! have outside, the site's directory of sockets, in which it can open its own alone, and a handful
//! of devices, userfaultfd among them, which belong to it. A uid is taken as long as a process
//! has it or a directory beside the machine's belongs to it.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Gid, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde::{Deserialize, Serialize};

use crate::error::QemuError;

/// Held while a uid is chosen and until a process has it.
const LOCK: &str = "/run/godwit-uids.lock";
/// Where the new root is made; nothing of it is needed inside.
const BASE: &str = "/sys";
/// Directories and files of the host that programs need, as far as they are there.
const PROGRAMS: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
];
/// Devices that everybody may use.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];
/// Below the run directory: where QEMU may make sockets.
pub(crate) const NURSERY: &str = "v";

/// The uids that QEMUs and the programs beside them get, one each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UidRange {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

impl UidRange {
    /// What is taken when nothing is said: 65,536 uids that distributions give to nobody.
    pub const USUAL: Self = Self { first: 2_000_000_000, last: 2_000_065_535 };

    /// Whether it holds `uid`.
    #[must_use]
    pub const fn holds(self, uid: u32) -> bool {
        self.first <= uid && uid <= self.last
    }
}

impl std::fmt::Display for UidRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl std::str::FromStr for UidRange {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("'{s}' is no range of uids such as {}", Self::USUAL);
        let (first, last) = s.split_once('-').ok_or_else(bad)?;
        let number = |s: &str| s.trim().parse::<u32>().map_err(|_| bad());
        let range = Self { first: number(first)?, last: number(last)? };
        // The last one means 'no uid' to the kernel.
        match (1..=range.last).contains(&range.first) && range.last < u32::MAX {
            true => Ok(range),
            false => Err(bad()),
        }
    }
}

/// How the QEMU of a launch is kept apart from everything else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confine {
    /// Where its uid comes from; its gid is the same number.
    pub uids: UidRange,
    /// A directory on the file system of the machine's memory, for states on their way.
    pub scratch: PathBuf,
    /// What it may read besides the files of its launch: the image of its machine.
    pub readable: Vec<PathBuf>,
}

/// A uid that nobody else takes while this lives.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) uid: u32,
    _lock: File,
}

/// Chooses one of `uids` for the process whose directory among those of the site's is `run_dir`.
pub(crate) fn claim(uids: UidRange, run_dir: &Path) -> Result<Claim, QemuError> {
    let path = Path::new(LOCK);
    let lock = own_file(path).map_err(QemuError::file("opening the lock on uids", path))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|e| QemuError::file("taking the lock on uids", path)(e.into()))?;
    let beside = owners_of_sibling_dirs(run_dir);
    let n = uids.last - uids.first + 1;
    // Not always from the first: a uid rests for long after its machine has gone.
    let start =
        u32::from_ne_bytes(uuid::Uuid::new_v4().as_bytes()[..4].try_into().unwrap_or_default()) % n;
    let mut all = (0..n).map(|i| uids.first + (start + i) % n);
    match all.find(|uid| !beside.contains(uid) && !has_process(*uid)) {
        Some(uid) => Ok(Claim { uid, _lock: lock }),
        None => Err(QemuError::Launch {
            name: run_dir.display().to_string(),
            why: format!("none of the uids {uids} is free"),
        }),
    }
}

/// Whether a process has this uid. All of ours have one uid in every sense. The kernel answers in some
/// microseconds; to read what each process tells of itself takes milliseconds, and ten times that on
/// a busy host.
fn has_process(uid: u32) -> bool {
    !matches!(rustix::process::getpriority_user(Uid::from_raw(uid)), Err(rustix::io::Errno::SRCH))
}

/// The uids and gids to which directories beside `run_dir` belong.
fn owners_of_sibling_dirs(run_dir: &Path) -> HashSet<u32> {
    let mut owners = HashSet::new();
    for item in run_dir.parent().map(std::fs::read_dir).into_iter().flatten().flatten().flatten() {
        if let Ok(meta) = item.metadata()
            && item.path() != run_dir
        {
            owners.extend([meta.uid(), meta.gid()]);
        }
    }
    owners
}

/// The mode of a directory of ours in which QEMU and a program beside it find each other's sockets:
/// everybody may go through, and its group is that program's.
pub(crate) const MEETING: u32 = 0o711;

fn is_meeting(dir: &std::fs::Metadata) -> bool {
    dir.is_dir()
        && dir.mode() & 0o777 == MEETING
        && dir.uid() == rustix::process::geteuid().as_raw()
}

/// Makes a directory of ours one in which the program with the uid `uid` meets a QEMU.
pub(crate) fn make_meeting(dir: &Path, uid: u32) -> Result<(), QemuError> {
    lchown(dir, None, Some(uid))
        .and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(MEETING)))
        .map_err(QemuError::file("handing over", dir))
}

/// Lets the group `uid` go through a directory of ours, and nobody else.
pub(crate) fn open_dir(dir: &Path, uid: u32) -> Result<(), QemuError> {
    if std::fs::symlink_metadata(dir).is_ok_and(|meta| is_meeting(&meta)) {
        return Ok(());
    }
    lchown(dir, None, Some(uid))
        .and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(0o710)))
        .map_err(QemuError::file("handing over", dir))
}

/// Gives a file in a directory of ours to `uid`.
pub(crate) fn give_file(path: &Path, uid: u32) -> Result<(), QemuError> {
    lchown(path, Some(uid), Some(uid)).map_err(QemuError::file("handing over", path))
}

/// Lets `uid` read a layer of its disk: one of its own by its group, one that it shares with others
/// as everybody who sees it, which is whom it is shown to.
pub(crate) fn let_read(path: &Path, uid: u32) -> Result<(), QemuError> {
    let meta = std::fs::metadata(path).map_err(QemuError::file("looking at", path))?;
    if meta.mode() & 0o004 != 0 || meta.uid() == uid {
        return Ok(());
    }
    chown(path, None, Some(uid))
        .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(0o640)))
        .map_err(QemuError::file("handing over", path))
}

/// The file at `path`, made where there is none, for its owner alone; never through a link.
fn own_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// Makes an empty file of `uid`'s, or gives it one that is there.
pub(crate) fn make_file(path: &Path, uid: u32) -> Result<(), QemuError> {
    let file = own_file(path).map_err(QemuError::file("making", path))?;
    rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
        .map_err(|e| QemuError::file("handing over", path)(e.into()))
}

/// Makes the run directory of a QEMU and what it writes to there: it can make no other file in
/// it but in the nursery.
pub(crate) fn make_run_dir(run_dir: &Path, files: &[&Path], uid: u32) -> Result<(), QemuError> {
    open_dir(run_dir, uid)?;
    for file in files {
        make_file(file, uid)?;
    }
    let nursery = run_dir.join(NURSERY);
    match std::fs::create_dir(&nursery) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(QemuError::file("making", &nursery)(e));
        }
        _ => {}
    }
    std::fs::set_permissions(&nursery, Permissions::from_mode(0o700))
        .and_then(|()| chown(&nursery, Some(uid), Some(uid)))
        .map_err(QemuError::file("handing over", &nursery))
}

/// Lets `uid` connect to the socket at `path`, whose directory is ours.
pub(crate) fn open_socket(path: &Path, uid: u32) -> Result<(), QemuError> {
    if let Some(dir) = path.parent() {
        open_dir(dir, uid)?;
    }
    let_connect(path, uid)
}

/// Lets the program that a QEMU meets in the socket's directory connect to it, if there is one.
pub(crate) fn share_socket(path: &Path) -> Result<(), QemuError> {
    let dir = path.parent().unwrap_or(path);
    let meta = std::fs::symlink_metadata(dir).map_err(QemuError::file("looking at", dir))?;
    if is_meeting(&meta) { let_connect(path, meta.gid()) } else { Ok(()) }
}

fn let_connect(path: &Path, uid: u32) -> Result<(), QemuError> {
    let fail = |e: rustix::io::Errno| QemuError::file("handing over", path)(e.into());
    // Held open, so that what is looked at is what is changed.
    let socket =
        rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(fail)?;
    let stat = rustix::fs::fstat(&socket).map_err(fail)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(QemuError::Unexpected {
            what: "a socket",
            why: format!("{} is none", path.display()),
        });
    }
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&socket));
    let changed = chown(&link, None, Some(uid))
        .and_then(|()| std::fs::set_permissions(&link, Permissions::from_mode(0o660)));
    changed.map_err(QemuError::file("handing over", path))
}

/// Moves a socket that QEMU has made in its nursery to `path`, in a directory of ours, where
/// it can't put another in its place.
pub(crate) fn take_socket(made: &Path, path: &Path, uid: u32) -> Result<(), QemuError> {
    std::fs::rename(made, path).map_err(QemuError::file("taking a socket from", made))?;
    let meta = std::fs::symlink_metadata(path).map_err(QemuError::file("looking at", path))?;
    if meta.file_type().is_socket() && meta.uid() == uid {
        return Ok(());
    }
    let removed = match meta.is_dir() {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path),
    };
    removed.map_err(QemuError::file("removing", path))?;
    Err(QemuError::Unexpected {
        what: "what QEMU offers as a socket",
        why: format!("{} is none of its own", made.display()),
    })
}

/// One thing that is made between fork and exec.
#[derive(Debug)]
enum Step {
    Dir(CString),
    File(CString),
    Link {
        to: CString,
        at: CString,
    },
    /// `from` also at `at`; read-only, if so.
    Bind {
        from: CString,
        at: CString,
        read_only: bool,
    },
    /// A device of the uid's own.
    Device {
        at: CString,
        number: u64,
    },
}

/// Everything that a QEMU sees, worked out before the fork: after it nothing is allocated.
#[derive(Debug)]
pub(crate) struct Cell {
    uid: u32,
    steps: Vec<Step>,
    known: HashSet<PathBuf>,
    /// Directories that are shown with all that is in them.
    whole: Vec<PathBuf>,
    names: Names,
}

#[derive(Debug)]
struct Names {
    root: CString,
    base: CString,
    proc: CString,
    here: CString,
    tmpfs: CString,
    proc_type: CString,
    proc_options: CString,
    tmpfs_options: CString,
}

fn c(bytes: impl Into<Vec<u8>>) -> Result<CString, QemuError> {
    CString::new(bytes).map_err(|e| QemuError::Unexpected { what: "a path", why: e.to_string() })
}

fn inside(path: &Path) -> Result<CString, QemuError> {
    c([BASE.as_bytes(), path.as_os_str().as_bytes()].concat())
}

impl Cell {
    /// One for `uid`, with the programs of the host.
    pub(crate) fn new(uid: u32) -> Result<Self, QemuError> {
        let names = Names {
            root: c("/")?,
            base: c(BASE)?,
            proc: inside(Path::new("/proc"))?,
            here: c(".")?,
            tmpfs: c("tmpfs")?,
            proc_type: c("proc")?,
            proc_options: c("hidepid=2")?,
            tmpfs_options: c("mode=755,size=1m")?,
        };
        let mut cell =
            Self { uid, steps: Vec::new(), known: HashSet::new(), whole: Vec::new(), names };
        for path in PROGRAMS.iter().map(Path::new).filter(|p| p.symlink_metadata().is_ok()) {
            match std::fs::read_link(path) {
                // `/lib -> usr/lib`; a file that is a link is bound as what it leads to.
                Ok(to) if path.is_dir() => {
                    let (to, at) = (c(to.as_os_str().as_bytes())?, inside(path)?);
                    cell.steps.push(Step::Link { to, at });
                    cell.known.insert(path.to_owned());
                }
                _ if path.exists() => cell.bind(path, true)?,
                _ => {}
            }
        }
        for device in DEVICES {
            cell.bind(Path::new(device), false)?;
        }
        cell.dir(Path::new("/proc"))?;
        Ok(cell)
    }

    /// Shows `program`, which may lie elsewhere, with what is installed beside it.
    pub(crate) fn program(&mut self, program: &Path) -> Result<(), QemuError> {
        if let Some(dir) = found(program).as_deref().and_then(Path::parent)
            && !PROGRAMS.iter().any(|p| dir.starts_with(p))
        {
            self.bind(dir.parent().filter(|p| p.parent().is_some()).unwrap_or(dir), true)?;
        }
        Ok(())
    }

    /// A device of the host as one of the uid's own, if the host has it.
    pub(crate) fn device(&mut self, path: &str) -> Result<(), QemuError> {
        let Ok(meta) = std::fs::metadata(path) else { return Ok(()) };
        if meta.file_type().is_char_device() {
            self.dirs_above(Path::new(path))?;
            self.steps.push(Step::Device { at: inside(Path::new(path))?, number: meta.rdev() });
        }
        Ok(())
    }

    /// Shows a file or a directory at its own path.
    pub(crate) fn bind(&mut self, path: &Path, read_only: bool) -> Result<(), QemuError> {
        // Nothing is ever made in a directory of the host.
        if self.known.contains(path) || self.is_shown(path) {
            return Ok(());
        }
        let meta = std::fs::metadata(path).map_err(QemuError::file("looking at", path))?;
        if meta.is_dir() {
            self.dir(path)?;
            self.whole.push(path.to_owned());
        } else {
            self.dirs_above(path)?;
            self.known.insert(path.to_owned());
            self.steps.push(Step::File(inside(path)?));
        }
        let (from, at) = (c(path.as_os_str().as_bytes())?, inside(path)?);
        self.steps.push(Step::Bind { from, at, read_only });
        Ok(())
    }

    fn is_shown(&self, path: &Path) -> bool {
        self.whole.iter().any(|dir| path.starts_with(dir))
    }

    fn dirs_above(&mut self, path: &Path) -> Result<(), QemuError> {
        path.parent().map_or(Ok(()), |above| self.dir(above))
    }

    fn dir(&mut self, path: &Path) -> Result<(), QemuError> {
        if path.parent().is_none() || self.known.contains(path) || self.is_shown(path) {
            return Ok(());
        }
        self.dirs_above(path)?;
        self.known.insert(path.to_owned());
        self.steps.push(Step::Dir(inside(path)?));
        Ok(())
    }

    /// Makes it all and becomes the uid. Only for a process that has just been forked.
    pub(crate) fn enter(&self) -> std::io::Result<()> {
        use rustix::mount;
        let n = &self.names;
        // SAFETY: the file descriptor table stays shared with nobody; a forked process has one
        // thread, whose mounts alone change.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
        mount::mount_change(
            n.root.as_c_str(),
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )?;
        let plain = MountFlags::NOSUID | MountFlags::NOEXEC;
        let options = n.tmpfs_options.as_c_str();
        mount::mount(n.tmpfs.as_c_str(), n.base.as_c_str(), n.tmpfs.as_c_str(), plain, options)?;
        for step in &self.steps {
            self.make(step)?;
        }
        let (kind, options) = (n.proc_type.as_c_str(), n.proc_options.as_c_str());
        mount::mount(kind, n.proc.as_c_str(), kind, plain | MountFlags::NODEV, options)?;
        rustix::process::chdir(n.base.as_c_str())?;
        rustix::process::pivot_root(n.here.as_c_str(), n.here.as_c_str())?;
        // The old root now lies over the new one.
        mount::unmount(n.here.as_c_str(), UnmountFlags::DETACH)?;
        rustix::process::chdir(n.root.as_c_str())?;
        mount::mount_remount(n.root.as_c_str(), plain | MountFlags::RDONLY, c"")?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.uid));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        rustix::thread::set_no_new_privs(true)?;
        Ok(())
    }

    fn make(&self, step: &Step) -> std::io::Result<()> {
        use rustix::fs::{CWD, mkdir, mknodat, open, symlink};
        use rustix::mount;
        match step {
            Step::Dir(at) => mkdir(at.as_c_str(), Mode::from_raw_mode(0o755))?,
            Step::File(at) => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                drop(open(at.as_c_str(), flags, Mode::from_raw_mode(0o600))?);
            }
            Step::Link { to, at } => symlink(to.as_c_str(), at.as_c_str())?,
            Step::Bind { from, at, read_only } => {
                mount::mount_bind_recursive(from.as_c_str(), at.as_c_str())?;
                if *read_only {
                    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID;
                    mount::mount_remount(at.as_c_str(), flags | MountFlags::NODEV, c"")?;
                }
            }
            Step::Device { at, number } => {
                let mode = Mode::from_raw_mode(0o600);
                mknodat(CWD, at.as_c_str(), FileType::CharacterDevice, mode, *number)?;
                let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.uid));
                rustix::fs::chown(at.as_c_str(), Some(uid), Some(gid))?;
            }
        }
        Ok(())
    }
}

/// Where `program` is, as the path of programs has it.
fn found(program: &Path) -> Option<PathBuf> {
    if program.is_absolute() {
        return Some(program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join(program)).find(|p| p.is_absolute() && p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_uids_is_read_and_never_holds_root() {
        let range: UidRange = "2000-2003".parse().unwrap();
        assert!(range.holds(2000) && range.holds(2003) && !range.holds(2004));
        assert_eq!(UidRange::USUAL.to_string().parse(), Ok(UidRange::USUAL));
        for bad in ["0-5", "7-6", "5", "a-b", "1-4294967295", "-1-5"] {
            assert!(bad.parse::<UidRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn nothing_is_made_in_a_directory_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, file) = (dir.path().join("d"), dir.path().join("d/f"));
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(&file, b"x").unwrap();
        let mut cell = Cell::new(2_000_000_000).unwrap();
        cell.bind(dir.path(), true).unwrap();
        let steps = cell.steps.len();
        for path in [&inner, &file] {
            cell.bind(path, false).unwrap();
        }
        assert_eq!(cell.steps.len(), steps, "{:?}", cell.steps);
    }

    #[test]
    fn a_uid_is_in_use_by_a_process_and_by_a_sibling_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&mine).unwrap();
        std::fs::create_dir(&other).unwrap();
        let me = rustix::process::geteuid().as_raw();
        assert!(has_process(me) && !has_process(2_000_000_000 + std::process::id()));
        if me != 0 {
            return;
        }
        lchown(&mine, None, Some(2_000_000_001)).unwrap();
        lchown(&other, None, Some(2_000_000_002)).unwrap();
        let owners = owners_of_sibling_dirs(&mine);
        assert!(!owners.contains(&2_000_000_001) && owners.contains(&2_000_000_002));
    }

    #[test]
    fn what_is_no_socket_of_its_own_is_not_taken_from_a_nursery() {
        let dir = tempfile::tempdir().unwrap();
        let (made, path) = (dir.path().join("s"), dir.path().join("vnc.sock"));
        let me = rustix::process::geteuid().as_raw();
        std::os::unix::fs::symlink("/etc/passwd", &made).unwrap();
        take_socket(&made, &path, me).expect_err("a link");
        assert!(path.symlink_metadata().is_err());
        let _socket = std::os::unix::net::UnixListener::bind(&made).unwrap();
        take_socket(&made, &path, me + 1).expect_err("another's");
        let _socket = std::os::unix::net::UnixListener::bind(&made).unwrap();
        take_socket(&made, &path, me).unwrap();
        assert!(path.symlink_metadata().unwrap().file_type().is_socket());
    }
}
