//! Making and checking image files, with `qemu-img` where QEMU's own word counts.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use godwit_types::BLOCK_SIZE;

use super::header::{HEADER_BYTES, MAX_DISK_BYTES, Qcow2Error, Qcow2Header};
use crate::error::{DiskError, io_error};

/// Bytes in a cluster of the images made here: one block. So a write of whole blocks in `top`
/// never needs the rest of a cluster from below, which in post-copy would be a pull.
pub const CLUSTER_BYTES: u64 = BLOCK_SIZE as u64;

/// What a new overlay stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing<'a> {
    /// Nothing is named in the file; whoever opens it gives the lower node.
    None,
    /// A raw base image.
    Raw(&'a Path),
    /// Another qcow2 layer.
    Qcow2(&'a Path),
}

impl Backing<'_> {
    fn named(&self) -> Option<(&Path, &'static str)> {
        match self {
            Self::None => None,
            Self::Raw(p) => Some((p, "raw")),
            Self::Qcow2(p) => Some((p, "qcow2")),
        }
    }
}

/// Refuses paths that QEMU could take for something else than a file.
pub(super) fn plain(path: &Path) -> Result<&str, DiskError> {
    let refuse = |why| DiskError::Path { path: path.to_path_buf(), why };
    let text = path.to_str().ok_or_else(|| refuse("it is not UTF-8"))?;
    if !path.is_absolute() {
        return Err(refuse("it is not absolute"));
    }
    if path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(refuse("it contains `..`"));
    }
    if text.len() > 1000 || text.chars().any(char::is_control) {
        return Err(refuse("it is too long or has control characters"));
    }
    Ok(text)
}

/// The name beside `path` under which its new contents are made.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Renames the finished `from` to `to` and makes the directory entry durable.
pub(super) fn publish(from: &Path, to: &Path) -> Result<(), DiskError> {
    fs::rename(from, to).map_err(io_error("renaming a new file to", to))?;
    sync_dir(to)
}

/// Makes the directory entry `to` durable.
pub(super) fn sync_dir(to: &Path) -> Result<(), DiskError> {
    if let Some(dir) = to.parent() {
        File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("syncing", dir))?;
    }
    Ok(())
}

fn qemu_img(verb: &'static str, path: &Path, args: &[&str]) -> Result<(i32, String), DiskError> {
    let out = Command::new("qemu-img")
        .arg(verb)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(io_error("running qemu-img for", path))?;
    let said = String::from_utf8_lossy(&out.stderr);
    let said: String = said.trim().chars().rev().take(600).collect();
    Ok((out.status.code().unwrap_or(-1), said.chars().rev().collect()))
}

/// Creates an empty overlay of `bytes` bytes at `path`, which must not exist yet. It appears
/// under its name only when it is whole.
///
/// # Errors
/// If a path can't be given to QEMU safely, the size is unfit, or the file can't be made.
pub fn create_overlay(path: &Path, backing: Backing<'_>, bytes: u64) -> Result<(), DiskError> {
    plain(path)?;
    let unfit = |why| DiskError::Unfit { path: path.to_path_buf(), why };
    if bytes == 0 || bytes > MAX_DISK_BYTES || !bytes.is_multiple_of(BLOCK_SIZE as u64) {
        return Err(unfit("its size is not a whole number of blocks up to 1 TiB"));
    }
    if path.exists() {
        return Err(unfit("it exists already"));
    }
    let temp = beside(path, ".new");
    let options = format!("cluster_size={CLUSTER_BYTES}");
    let mut args = vec!["-q", "-f", "qcow2", "-o", &options];
    if let Some((lower, format)) = backing.named() {
        args.extend(["-u", "-b", plain(lower)?, "-F", format]);
    }
    let size = bytes.to_string();
    args.extend([plain(&temp)?, &size]);
    let result = match qemu_img("create", path, &args)? {
        (0, _) => publish(&temp, path),
        (_, said) if said.contains("No space left") => Err(DiskError::NoRoom {
            doing: "creating",
            path: path.to_path_buf(),
            source: std::io::ErrorKind::StorageFull.into(),
        }),
        (_, said) => Err(DiskError::Tool { verb: "create", path: path.to_path_buf(), said }),
    };
    if result.is_err() {
        let _ = fs::remove_file(&temp);
    }
    result
}

/// Looks at a qcow2 file before anything opens it. Its backing file name must be absent or name
/// exactly the file that it is meant to stand on.
///
/// # Errors
/// If it must not be used; says why.
pub fn inspect(path: &Path, backing: Backing<'_>) -> Result<Qcow2Header, DiskError> {
    inspect_open(&File::open(path).map_err(io_error("opening", path))?, path, backing)
}

/// As [`inspect`], of an open file that is called `path`.
pub(super) fn inspect_open(
    file: &File,
    path: &Path,
    backing: Backing<'_>,
) -> Result<Qcow2Header, DiskError> {
    let meta = file.metadata().map_err(io_error("inspecting", path))?;
    if !meta.is_file() {
        return Err(DiskError::Unfit { path: path.to_path_buf(), why: "it is not a plain file" });
    }
    let mut head = vec![0; HEADER_BYTES.min(usize::try_from(meta.len()).unwrap_or(HEADER_BYTES))];
    file.read_exact_at(&mut head, 0).map_err(io_error("reading", path))?;
    let refused = |source| DiskError::Refused { path: path.to_path_buf(), source };
    let header = Qcow2Header::parse(&head, meta.len()).map_err(refused)?;
    if let Some(name) = &header.backing
        && backing.named().is_none_or(|(lower, _)| lower != Path::new(name))
    {
        return Err(refused(Qcow2Error::ForeignBacking(name.clone())));
    }
    if !header.virtual_bytes.is_multiple_of(BLOCK_SIZE as u64) {
        return Err(refused(Qcow2Error::Field("size")));
    }
    Ok(header)
}

/// Checks that `path` can serve as a raw base and returns its size in bytes.
///
/// # Errors
/// If it is no plain file of whole blocks, or is in truth a qcow2 file.
pub fn check_base(path: &Path) -> Result<u64, DiskError> {
    let unfit = |why| DiskError::Unfit { path: path.to_path_buf(), why };
    let mut file = File::open(path).map_err(io_error("opening", path))?;
    let meta = file.metadata().map_err(io_error("inspecting", path))?;
    if !meta.is_file() {
        return Err(unfit("it is not a plain file"));
    }
    let bytes = meta.len();
    if bytes == 0 || bytes > MAX_DISK_BYTES || !bytes.is_multiple_of(BLOCK_SIZE as u64) {
        return Err(unfit("a base has a whole number of blocks up to 1 TiB"));
    }
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(io_error("reading", path))?;
    if &magic == b"QFI\xfb" {
        return Err(unfit("a base must be raw, and this is qcow2"));
    }
    Ok(bytes)
}

/// The bytes of the virtual disk of a layer.
///
/// # Errors
/// As [`inspect`].
pub fn virtual_bytes(path: &Path, backing: Backing<'_>) -> Result<u64, DiskError> {
    Ok(inspect(path, backing)?.virtual_bytes)
}

/// Repairs a qcow2 file that nobody has open with `qemu-img check`: gives back clusters that a
/// crash left unused and sets reference counts right. True if the image is sound afterwards.
///
/// # Errors
/// If the check can't be run.
pub fn qemu_img_repair(path: &Path) -> Result<bool, DiskError> {
    let name = plain(path)?;
    // 0 sound, 1 could not go on, 2 corrupt, 3 leaks alone.
    let (code, _) = qemu_img("check", path, &["-q", "-f", "qcow2", "-r", "leaks", name])?;
    if matches!(code, 0 | 3) {
        return Ok(true);
    }
    qemu_img("check", path, &["-q", "-f", "qcow2", "-r", "all", name])?;
    Ok(qemu_img("check", path, &["-q", "-f", "qcow2", name])?.0 == 0)
}
