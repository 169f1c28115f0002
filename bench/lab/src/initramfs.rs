//! What a machine holds: an archive in `newc` format, streamed and the same for the same input.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

/// Mounts what a Linux program expects, then answers the control channel (see `machine.rs`): one
/// command a line, its output with `| ` before each line, then `= STATUS`. Output goes through a
/// file, so that what a command leaves running in the background does not keep the answer open.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
mount -t bpf bpf /sys/fs/bpf 2>/dev/null
ip link set lo up 2>/dev/null
cd /root
exec 3<>/dev/ttyS1
stty raw -echo <&3
echo "@ ready" >&3
while read -r line <&3; do
    sh -c "$line" </dev/null >/tmp/.answer 2>&1
    status=$?
    sed 's/^/| /' /tmp/.answer >&3
    echo >&3
    echo "= $status" >&3
done
poweroff -f
"#;

enum Content {
    Host(PathBuf),
    Text(String),
}

/// The files of a machine. Busybox is `/bin/busybox` with all its names in `/bin`.
#[derive(Default)]
pub struct Initramfs {
    files: BTreeMap<String, (u32, Content)>,
}

impl Initramfs {
    /// Nothing but busybox, the directories a system needs, and the init that answers commands.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a program of the host as `/bin/NAME`, with the shared libraries it needs.
    ///
    /// # Errors
    ///
    /// [`Error::Program`] where it does not exist or a library of it is not found.
    pub fn program(mut self, program: impl AsRef<Path>) -> Result<Self, Error> {
        let program = program.as_ref();
        let fail = |reason: String| Error::Program { program: program.to_owned(), reason };
        let name = program.file_name().ok_or_else(|| fail("it has no name".to_owned()))?;
        if !program.is_file() {
            return Err(fail("there is no such file".to_owned()));
        }
        for library in libraries(program)? {
            let inside = library.to_string_lossy().into_owned();
            self = self.file(inside, &library, 0o755);
        }
        let inside = format!("/bin/{}", name.to_string_lossy());
        Ok(self.file(inside, program, 0o755))
    }

    /// Adds a file of the host under the name `inside`, with `mode`.
    #[must_use]
    pub fn file(mut self, inside: impl Into<String>, host: impl AsRef<Path>, mode: u32) -> Self {
        let content = Content::Host(host.as_ref().to_owned());
        self.files.insert(inside.into(), (REGULAR | (mode & 0o7777), content));
        self
    }

    /// Adds a shell script as `/bin/NAME`.
    #[must_use]
    pub fn script(mut self, name: &str, text: impl Into<String>) -> Self {
        self.files.insert(format!("/bin/{name}"), (REGULAR | 0o755, Content::Text(text.into())));
        self
    }

    /// Writes the archive.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where a file cannot be read or `to` not be written; [`Error::Program`] where
    /// there is no static busybox.
    pub fn write(&self, to: &mut dyn Write) -> Result<(), Error> {
        let busybox = PathBuf::from("/bin/busybox");
        if !busybox.is_file() || !libraries(&busybox)?.is_empty() {
            let reason = "a static one is needed: install busybox-static".to_owned();
            return Err(Error::Program { program: busybox, reason });
        }
        let busybox = (REGULAR | 0o755, Content::Host(busybox));
        let init = (REGULAR | 0o755, Content::Text(INIT.to_owned()));
        let mut all: BTreeMap<&str, &(u32, Content)> =
            self.files.iter().map(|(name, file)| (name.as_str(), file)).collect();
        all.insert("/bin/busybox", &busybox);
        all.insert("/init", &init);

        let mut directories: BTreeSet<&str> =
            ["dev", "proc", "sys", "tmp", "run", "root", "etc"].into();
        for name in all.keys().map(|name| name.trim_matches('/')) {
            directories.extend(name.match_indices('/').map(|(end, _)| &name[..end]));
        }
        let mut archive = Archive { to, inode: 0 };
        for name in directories {
            archive.entry(name, DIRECTORY, 0, &mut io::empty())?;
        }
        for (name, (mode, content)) in all {
            let name = name.trim_matches('/');
            match content {
                Content::Text(text) => {
                    archive.entry(name, *mode, text.len() as u64, &mut text.as_bytes())?;
                }
                Content::Host(path) => {
                    let doing = || format!("reading {} for a guest", path.display());
                    let mut file = File::open(path).map_err(Error::io(doing()))?;
                    let size = file.metadata().map_err(Error::io(doing()))?.len();
                    archive.entry(name, *mode, size, &mut file)?;
                }
            }
        }
        archive.entry("TRAILER!!!", 0, 0, &mut io::empty())
    }
}

struct Archive<'a> {
    to: &'a mut dyn Write,
    inode: u32,
}

impl Archive<'_> {
    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        size: u64,
        from: &mut dyn io::Read,
    ) -> Result<(), Error> {
        self.inode += 1;
        let doing = || format!("writing {name} into an initramfs");
        let too_big = |_| io::Error::new(io::ErrorKind::FileTooLarge, "newc holds 4 GiB at most");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(size).map_err(too_big).map_err(Error::io(doing()))?,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08X}"));
        }
        head.push_str(name);
        // The name ends with a zero; name and content are padded to 4 bytes.
        let padded = (head.len() + 1).next_multiple_of(4);
        let mut head = head.into_bytes();
        head.resize(padded, 0);
        self.to.write_all(&head).map_err(Error::io(doing()))?;
        let written = io::copy(&mut io::Read::take(from, size), self.to);
        if written.map_err(Error::io(doing()))? != size {
            let shrunk = io::Error::new(io::ErrorKind::UnexpectedEof, "the file has shrunk");
            return Err(Error::Io { doing: doing(), source: shrunk });
        }
        let pad = [0; 3];
        let pad = &pad[..(size.next_multiple_of(4) - size) as usize];
        self.to.write_all(pad).map_err(Error::io(doing()))
    }
}

/// The shared libraries of `program`, the dynamic linker among them; none if it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let fail = |reason: String| Error::Program { program: program.to_owned(), reason };
    let mode = program.metadata().map_err(Error::io(format!("reading {}", program.display())))?;
    if mode.permissions().mode() & 0o111 == 0 {
        return Err(fail("it is not executable".to_owned()));
    }
    let output = Command::new("ldd").arg(program).output().map_err(Error::io("starting ldd"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let is_static = [&said, &errors].iter().any(|s| s.contains("not a dynamic executable"));
        return if is_static { Ok(Vec::new()) } else { Err(fail(errors.trim().to_owned())) };
    }
    let mut found = Vec::new();
    for line in said.lines().map(str::trim) {
        if line.ends_with("not found") {
            return Err(fail(format!("a library is missing: {line}")));
        }
        // `libc.so.6 => /lib/.../libc.so.6 (0x...)` or `/lib64/ld-linux-x86-64.so.2 (0x...)`.
        let path = line.split(" => ").last().unwrap_or_default();
        let path = path.split(" (0x").next().unwrap_or_default();
        if path.starts_with('/') {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(initramfs: &Initramfs) -> Vec<u8> {
        let mut to = Vec::new();
        initramfs.write(&mut to).expect("written to memory");
        to
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let one = Initramfs::new().script("b", "echo b").script("a", "echo a");
        let two = Initramfs::new().script("a", "echo a").script("b", "echo b");
        assert_eq!(bytes(&one), bytes(&two));
    }

    #[test]
    fn a_program_brings_its_libraries() {
        let initramfs = Initramfs::new().program("/bin/bash").expect("every Debian has bash");
        assert!(initramfs.files.contains_key("/bin/bash"));
        assert!(initramfs.files.keys().any(|name| name.contains("libc.so")));
        assert!(initramfs.files.keys().any(|name| name.contains("ld-linux")));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Initramfs::new().program("/no/such").err().expect("there is none");
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
