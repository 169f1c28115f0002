//! Real QEMU processes whose vCPUs are all busy, by a boot sector that starts the others.

#![allow(dead_code, reason = "each test program uses its part")]

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The boot sector, assembled:
///
/// ```text
///   cli; xor ax,ax; mov ds,ax
///   mov word [0x8000], 0xfeeb        ; what the other vCPUs run: jmp $
///   lgdt [0x7c60]; mov eax,cr0; or al,1; mov cr0,eax
///   mov bx,8; mov ds,bx              ; all of the address space as data
///   mov dword [0xfee00300], 0xc4500  ; INIT to all but this one
///   xor cx,cx; loop $
///   mov dword [0xfee00300], 0xc4608  ; start at 0x8000, twice
///   xor cx,cx; loop $
///   mov dword [0xfee00300], 0xc4608
///   jmp $
/// ```
const SPIN: [u8; 75] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xc7, 0x06, 0x00, 0x80, 0xeb, 0xfe, 0x0f, 0x01, 0x16, 0x60, 0x7c,
    0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xbb, 0x08, 0x00, 0x8e, 0xdb, 0x67, 0x66, 0xc7,
    0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00, 0x31, 0xc9, 0xe2, 0xfe, 0x67, 0x66, 0xc7,
    0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x0c, 0x00, 0x31, 0xc9, 0xe2, 0xfe, 0x67, 0x66, 0xc7,
    0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x0c, 0x00, 0xeb, 0xfe,
];

/// The sector with the descriptor table that the code above points to.
pub(crate) fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..SPIN.len()].copy_from_slice(&SPIN);
    sector[0x58..0x60].copy_from_slice(&0x00cf_9200_0000_ffff_u64.to_le_bytes());
    sector[0x60..0x66].copy_from_slice(&[15, 0, 0x50, 0x7c, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A QEMU whose vCPUs spin; killed when dropped.
pub(crate) struct Qemu {
    child: Child,
    pub(crate) name: String,
}

impl Qemu {
    /// Starts one and waits until its vCPUs run.
    pub(crate) fn start(dir: &Path, name: &str, vcpus: usize) -> Self {
        let image = dir.join("spin.img");
        let mut file = std::fs::File::create(&image).expect("a boot sector's file");
        file.write_all(&boot_sector()).expect("to write the boot sector");
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-display", "none", "-nodefaults", "-m", "16"])
            .args(["-smp", &vcpus.to_string()])
            .args(["-name", &format!("{name},debug-threads=on")])
            .arg("-drive")
            .arg(format!("file={},format=raw,if=floppy,read-only=on", image.display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU; scripts/setup installs it");
        let qemu = Self { child, name: name.into() };
        // As many threads as vCPUs are busy once the first has started the others.
        eventually("all vCPUs run", || {
            let busy = qemu.vcpus().iter().filter(|t| ran_ns(qemu.pid(), **t) > 20_000_000).count();
            busy == vcpus
        });
        qemu
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process number")
    }

    /// The numbers of its vCPU threads, vCPU 0 first.
    pub(crate) fn vcpus(&self) -> Vec<i32> {
        let mut found: Vec<(String, i32)> = Vec::new();
        let dir = format!("/proc/{}/task", self.pid());
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let tid = entry.file_name().to_string_lossy().parse().expect("a thread number");
            if comm.starts_with("CPU ") {
                found.push((comm, tid));
            }
        }
        found.sort();
        found.into_iter().map(|(_, tid)| tid).collect()
    }

    /// Ends it at once, as `kill -9` does, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("to kill QEMU");
        self.child.wait().expect("QEMU's end");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Nanoseconds that a thread ran.
pub(crate) fn ran_ns(pid: i32, tid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat"));
    text.ok().and_then(|t| t.split(' ').next()?.parse().ok()).unwrap_or_default()
}

/// Waits for a state; says which one did not come.
pub(crate) fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
