//! Which accelerator runs guests, decided by a boot probe.
//!
//! `/dev/kvm` can be opened, and KVM_CREATE_VM succeed, on hosts where no guest gets further than
//! its first SSE instruction. So a program of a few hundred bytes is booted from a ROM: on x86-64
//! it goes from real mode to long mode with paging, uses SSE2 and the stack, and ends QEMU through
//! the debug-exit port; on arm64 it switches the machine off through PSCI. Whoever does not get
//! there in time falls back to TCG.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use godwit_types::{Arch, Hash};
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tracing::{debug, warn};

use crate::error::QemuError;

/// What executes guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// The processor, by KVM.
    Kvm,
    /// QEMU's translator, one thread a vCPU.
    Tcg,
}

impl Accel {
    /// QEMU's `-accel` option.
    pub(crate) const fn option(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi",
        }
    }

    /// Its short name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The outcome of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What to use.
    pub accel: Accel,
    /// Why, in words.
    pub why: String,
    /// What the answer holds for: QEMU, kernel, CPU and probe.
    key: String,
}

/// How long the probe program may take; it needs some milliseconds.
const PROBE_WITHIN: Duration = Duration::from_secs(5);

/// The accelerator for guests of `arch` run by `program`. The answer is kept in `cache` (a file)
/// for this QEMU version, host kernel and CPU.
///
/// # Errors
/// When `program` cannot be executed at all.
pub async fn probe(program: &Path, arch: Arch, cache: &Path) -> Result<Probe, QemuError> {
    let version = crate::doctor::qemu_version(program).await?;
    let key = cache_key(&version, arch);
    if let Ok(text) = std::fs::read(cache)
        && let Ok(known) = serde_json::from_slice::<Probe>(&text)
        && known.key == key
    {
        return Ok(known);
    }
    let (accel, why) = match native() {
        Some(native) if native == arch => match boots(program, arch, Accel::Kvm).await? {
            Ok(()) => (Accel::Kvm, "the probe program runs under KVM".to_owned()),
            Err(why) => (Accel::Tcg, why),
        },
        _ => (Accel::Tcg, format!("{arch} is not the host's architecture")),
    };
    let found = Probe { accel, why, key };
    debug!(accel = found.accel.name(), why = %found.why, "accelerator probed");
    if let Err(e) = remember(&found, cache) {
        warn!(error = %e, file = %cache.display(), "the accelerator probe is not kept");
    }
    Ok(found)
}

fn native() -> Option<Arch> {
    match std::env::consts::ARCH {
        "x86_64" => Some(Arch::X86_64),
        "aarch64" => Some(Arch::Aarch64),
        _ => None,
    }
}

fn cache_key(version: &str, arch: Arch) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let kernel = format!("{}{}", read("/proc/sys/kernel/osrelease"), read("/proc/version"));
    let cpu =
        read("/proc/cpuinfo").lines().take(30).filter(|l| !l.contains("MHz")).collect::<String>();
    let device = Path::new("/dev/kvm").exists();
    let text = format!("{version}\n{kernel}\n{cpu}\n{device}\n{arch}");
    let mut all = text.into_bytes();
    all.extend(rom(arch));
    Hash::of(&all).to_string()
}

fn remember(found: &Probe, cache: &Path) -> std::io::Result<()> {
    if let Some(dir) = cache.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let new = cache.with_extension(format!("new.{}", std::process::id()));
    std::fs::write(&new, serde_json::to_vec(found).map_err(std::io::Error::other)?)?;
    std::fs::rename(&new, cache)
}

/// Whether the probe program gets to its end under `accel`; the inner error says why not.
///
/// # Errors
/// When `program` cannot be executed, or there is no room for the ROM file.
pub async fn boots(
    program: &Path,
    arch: Arch,
    accel: Accel,
) -> Result<Result<(), String>, QemuError> {
    if accel == Accel::Kvm && !Path::new("/dev/kvm").exists() {
        return Ok(Err("there is no /dev/kvm".into()));
    }
    let rom_file = RomFile::make(arch)?;
    let mut command = Command::new(program);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-m", "64", "-accel", accel.option(), "-bios"]).arg(&rom_file.0);
    let wanted = match arch {
        Arch::X86_64 => {
            command.args(["-machine", "pc-q35-10.0,hpet=off", "-cpu", "Nehalem-v1"]);
            command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
            // The device gives the written byte, twice, plus one.
            0x10 << 1 | 1
        }
        Arch::Aarch64 => {
            let cpu = if accel == Accel::Kvm { "host" } else { "cortex-a72" };
            command.args(["-machine", "virt-10.0", "-cpu", cpu]);
            0
        }
    };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let start = |source| QemuError::Start { program: program.to_owned(), source };
    let mut child = command.spawn().map_err(start)?;
    let name = accel.name();
    match tokio::time::timeout(PROBE_WITHIN, child.wait()).await {
        Err(_) => {
            child.kill().await.map_err(start)?;
            Ok(Err(format!("the probe program hangs under {name}")))
        }
        Ok(status) => match status.map_err(start)?.code() {
            Some(code) if code == wanted => Ok(Ok(())),
            _ => Ok(Err(format!("QEMU fails under {name} before the probe program ends"))),
        },
    }
}

/// The ROM in a file that goes away with this.
struct RomFile(PathBuf);

impl RomFile {
    fn make(arch: Arch) -> Result<Self, QemuError> {
        let name = format!("godwit-probe-{}-{}", std::process::id(), uuid::Uuid::new_v4().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, rom(arch)).map_err(QemuError::file("writing the probe", &path))?;
        Ok(Self(path))
    }
}

impl Drop for RomFile {
    fn drop(&mut self) {
        // A probe that is left over is 64 KiB in the temporary directory.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn rom(arch: Arch) -> Vec<u8> {
    match arch {
        Arch::X86_64 => {
            // The ROM ends at 4 GiB; the reset vector, 16 bytes before, jumps to its start.
            let mut rom = vec![0u8; 64 << 10];
            rom[..X86_64.len()].copy_from_slice(&X86_64);
            rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
            rom
        }
        Arch::Aarch64 => {
            let mut rom: Vec<u8> = AARCH64.iter().flat_map(|i| i.to_le_bytes()).collect();
            rom.resize(4096, 0);
            rom
        }
    }
}

/// PSCI SYSTEM_OFF (0x84000008) by hypervisor call, then a loop.
const AARCH64: [u32; 4] = [0x5280_0100, 0x72b0_8000, 0xd400_0002, 0x1400_0000];

/// Assembled for offset 0 of a ROM at 0xffff0000.
#[rustfmt::skip]
const X86_64: [u8; 254] = [
    // Real mode: load the GDT, enter protected mode.
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x70, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0xf8,
    0x00, 0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x23, 0x00, 0xff,
    0xff, 0x08, 0x00,
    // Protected mode: page tables at 0x1000 map the first 2 MiB and the ROM; enter long mode.
    0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbf, 0x00, 0x10, 0x00, 0x00, 0x31,
    0xc0, 0xb9, 0x00, 0x0c, 0x00, 0x00, 0xfc, 0xf3, 0xab, 0xc7, 0x05, 0x00, 0x10, 0x00, 0x00, 0x03,
    0x20, 0x00, 0x00, 0xc7, 0x05, 0x00, 0x20, 0x00, 0x00, 0x03, 0x30, 0x00, 0x00, 0xc7, 0x05, 0x18,
    0x20, 0x00, 0x00, 0x03, 0x30, 0x00, 0x00, 0xc7, 0x05, 0x00, 0x30, 0x00, 0x00, 0x83, 0x00, 0x00,
    0x00, 0xc7, 0x05, 0xf8, 0x3f, 0x00, 0x00, 0x83, 0x00, 0xe0, 0xff, 0x0f, 0x20, 0xe0, 0x0d, 0x20,
    0x06, 0x00, 0x00, 0x0f, 0x22, 0xe0, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0xb9, 0x80,
    0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x00, 0x00, 0x0f, 0x30, 0x0f, 0x20, 0xc0, 0x83,
    0xe0, 0xfb, 0x0d, 0x02, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0xa4, 0x00, 0xff, 0xff, 0x18,
    0x00,
    // Long mode: cpuid, SSE2, a million pushes and pops; write 0x10 to port 0xf4; halt.
    0xbc, 0x00, 0x80, 0x00, 0x00, 0x31, 0xc0, 0x0f, 0xa2, 0xb8, 0x5a, 0x00, 0x00, 0x00, 0x66, 0x0f,
    0x6e, 0xc0, 0x66, 0x0f, 0xfe, 0xc0, 0x66, 0x0f, 0x7e, 0xc1, 0x81, 0xf9, 0xb4, 0x00, 0x00, 0x00,
    0x75, 0x0d, 0xb9, 0x40, 0x42, 0x0f, 0x00, 0x51, 0x5a, 0xe2, 0xfc, 0xb0, 0x10, 0xe6, 0xf4, 0xf4,
    0xeb, 0xfd, 0x66, 0x90,
    // GDT: null, 32-bit code, data, 64-bit code; its descriptor.
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xcf, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x93, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9b, 0xaf, 0x00,
    0x1f, 0x00, 0xd8, 0x00, 0xff, 0xff,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_vector_jumps_to_the_start() {
        let rom = rom(Arch::X86_64);
        let distance = u16::from_le_bytes([rom[0xfff1], rom[0xfff2]]);
        assert_eq!(0xfff3u16.wrapping_add(distance), 0);
        assert_eq!(rom.len(), 64 << 10);
    }

    #[test]
    fn an_answer_is_kept_for_one_version_only() {
        assert_ne!(cache_key("10.0.2", Arch::X86_64), cache_key("10.0.3", Arch::X86_64));
        assert_ne!(cache_key("10.0.2", Arch::X86_64), cache_key("10.0.2", Arch::Aarch64));
    }
}
