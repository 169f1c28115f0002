//! Real QEMU processes whose vCPUs are all busy, by a boot sector that starts the others.

#![allow(dead_code, reason = "each test program uses its part")]

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// A process that keeps one pCPU busy and counts there for ten: by its nice and, where the kernel
/// groups by session, by the nice of its own session.
pub(crate) struct Hog(Child);

impl Hog {
    pub(crate) fn on(cpu: usize) -> Self {
        let script = "echo -10 >/proc/$$/autogroup; while :; do :; done";
        let child = Command::new("nice")
            .args(["-n", "-10", "setsid", "sh", "-c", script])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nice, setsid and sh");
        let pid = i32::try_from(child.id()).expect("a process number");
        let only = std::iter::once(cpu).collect();
        godwit_sched_host::sys::set_affinity(pid, &only).expect("to bind the hog");
        Self(child)
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program whose threads are named like QEMU's vCPUs, under a name like QEMU's: this test program
/// itself, started once more. `fake_vm` in the tests is what it runs.
pub(crate) struct FakeVm {
    child: Child,
}

impl FakeVm {
    /// Copies this program to a name like QEMU's.
    pub(crate) fn program(dir: &Path) -> std::path::PathBuf {
        let to = dir.join("qemu-system-fake");
        let own = std::env::current_exe().expect("own program");
        std::fs::copy(own, &to).expect("to copy the test program");
        to
    }

    pub(crate) fn start(program: &Path, vcpus: u32) -> Self {
        let child = Command::new(program)
            .args(["--exact", "fake_vm", "--ignored", "--nocapture"])
            .env("FAKE_VM", vcpus.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the fake machine");
        Self { child }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process number")
    }

    /// `end N` ends vCPU N's thread, `add N` starts one.
    pub(crate) fn tell(&mut self, what: &str) {
        let stdin = self.child.stdin.as_mut().expect("its input");
        writeln!(stdin, "{what}").expect("it listens");
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the fake machine does: threads named like vCPUs, which spin (with `FAKE_IDLE`: sleep), until
/// its input ends.
pub(crate) fn be_a_fake_vm(vcpus: u32) {
    let mut ends = std::collections::HashMap::new();
    for n in 0..vcpus {
        ends.insert(n, spin(n));
    }
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        match line.split_once(' ').map(|(verb, n)| (verb, n.parse::<u32>())) {
            Some(("add", Ok(n))) => {
                ends.insert(n, spin(n));
            }
            Some(("end", Ok(n))) => {
                let end = ends.remove(&n).expect("a vCPU of that number");
                end.store(true, Ordering::Relaxed);
            }
            _ => panic!("what is {line:?}?"),
        }
    }
}

fn spin(n: u32) -> Arc<AtomicBool> {
    let end = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&end);
    let thread = std::thread::Builder::new().name(format!("CPU {n}/TCG"));
    let idle = std::env::var_os("FAKE_IDLE").is_some();
    let run = move || {
        while !told.load(Ordering::Relaxed) {
            if idle {
                std::thread::park();
            }
        }
    };
    thread.spawn(run).expect("a thread");
    end
}
