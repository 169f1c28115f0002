//! What a machine is made of, as far as the guest can see.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

use godwit_types::{Arch, Code, CodedError, Hash, Mib};
use serde::{Deserialize, Serialize};

use crate::tap::Tap;

/// A kernel or an initramfs: where it is here, and what it is everywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFile {
    /// Path on this host.
    pub path: PathBuf,
    /// BLAKE3 hash of the contents.
    pub hash: Hash,
}

impl BootFile {
    /// Hashes the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(path: impl Into<PathBuf>) -> std::io::Result<Self> {
        let path = path.into();
        let mut file = std::fs::File::open(&path)?;
        let mut hasher = blake3::Hasher::new();
        let mut buf = vec![0u8; 1 << 20];
        loop {
            match file.read(&mut buf)? {
                0 => break,
                n => hasher.update(&buf[..n]),
            };
        }
        Ok(Self { path, hash: Hash(*hasher.finalize().as_bytes()) })
    }
}

/// The guest-visible shape of a machine, and the files it boots from.
///
/// Machine type, CPU model and device addresses follow from `arch` and are pinned, so that two
/// machines of equal specs have the same command line wherever they run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Guest architecture.
    pub arch: Arch,
    /// Guest memory.
    pub memory: Mib,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Linux kernel for direct boot.
    pub kernel: BootFile,
    /// Initramfs.
    pub initrd: Option<BootFile>,
    /// Kernel command line.
    pub cmdline: String,
    /// A screen, a keyboard, a tablet and a multi-touch panel.
    pub display: bool,
    /// A virtio-blk disk, `/dev/vda`.
    pub disk: bool,
    /// Number of `pcie-root-port`s into which NICs can be plugged while the machine runs.
    pub nic_ports: u8,
}

/// Why a spec cannot be a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("machine spec: {field} is {value}, must be {must_be}")]
pub struct SpecError {
    /// The field.
    pub field: &'static str,
    /// What it holds.
    pub value: String,
    /// What is allowed.
    pub must_be: &'static str,
}

impl CodedError for SpecError {
    fn code(&self) -> Code {
        Code::Invalid
    }
}

impl MachineSpec {
    /// Spare NIC ports of a machine when nothing else is said.
    pub const DEFAULT_NIC_PORTS: u8 = 2;

    /// The pinned QEMU machine type.
    #[must_use]
    pub const fn machine_type(&self) -> &'static str {
        match self.arch {
            Arch::X86_64 => "pc-q35-10.0",
            Arch::Aarch64 => "virt-10.0",
        }
    }

    /// The pinned CPU model, the same under every accelerator.
    #[must_use]
    pub const fn cpu_model(&self) -> &'static str {
        match self.arch {
            Arch::X86_64 => "Nehalem-v1",
            Arch::Aarch64 => "cortex-a72",
        }
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// The first field that is out of bounds.
    pub fn check(&self) -> Result<(), SpecError> {
        let bad = |field, value: String, must_be| Err(SpecError { field, value, must_be });
        if !(32..=1 << 20).contains(&self.memory.0) {
            return bad("memory", self.memory.to_string(), "32 MiB to 1 TiB");
        }
        if !(1..=64).contains(&self.vcpus) {
            return bad("vcpus", self.vcpus.to_string(), "1 to 64");
        }
        if self.nic_ports > 8 {
            return bad("nic_ports", self.nic_ports.to_string(), "0 to 8");
        }
        if self.cmdline.len() > 2000 || self.cmdline.chars().any(char::is_control) {
            let shown = self.cmdline.chars().take(40).flat_map(char::escape_debug).collect();
            return bad("cmdline", shown, "at most 2000 bytes without control characters");
        }
        Ok(())
    }
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A locally administered address from the first bytes of a seed.
    #[must_use]
    pub const fn from_seed(seed: [u8; 5]) -> Self {
        Self([0x52, seed[0], seed[1], seed[2], seed[3], seed[4]])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<MacAddress> for String {
    fn from(m: MacAddress) -> Self {
        m.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = SpecError;
    fn try_from(s: String) -> Result<Self, SpecError> {
        s.parse()
    }
}

impl FromStr for MacAddress {
    type Err = SpecError;
    fn from_str(s: &str) -> Result<Self, SpecError> {
        let err = || SpecError {
            field: "mac",
            value: s.chars().take(40).flat_map(char::escape_debug).collect(),
            must_be: "six two-digit hex numbers with ':' between them, a unicast address",
        };
        let mut mac = [0u8; 6];
        let mut parts = s.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(err)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| err())?;
        }
        if parts.next().is_some() || mac[0] & 1 == 1 {
            return Err(err());
        }
        Ok(Self(mac))
    }
}

/// A NIC in one of the spare ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Which spare port, from 0.
    pub port: u8,
    /// Its MAC address.
    pub mac: MacAddress,
    /// What it is joined to.
    pub backend: NicBackend,
}

/// What a NIC is joined to on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicBackend {
    /// QEMU's user-mode network with nothing beyond QEMU reachable: DHCP and a link, no outside.
    Isolated,
    /// QEMU's user-mode network with the way out through the host open.
    User,
    /// An existing TAP interface; QEMU is handed a descriptor of it.
    Tap(Tap),
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn spec() -> MachineSpec {
        MachineSpec {
            arch: Arch::X86_64,
            memory: Mib(256),
            vcpus: 2,
            kernel: BootFile { path: "/images/tiny/vmlinuz".into(), hash: Hash::of(b"k") },
            initrd: Some(BootFile { path: "/images/tiny/initrd".into(), hash: Hash::of(b"i") }),
            cmdline: "console=ttyS0 quiet".into(),
            display: true,
            disk: true,
            nic_ports: 2,
        }
    }

    #[test]
    fn a_spec_out_of_bounds_names_the_field() {
        assert_eq!(spec().check(), Ok(()));
        type Spoil = fn(&mut MachineSpec);
        let cases: [(&str, Spoil); 4] = [
            ("memory", |s| s.memory = Mib(8)),
            ("vcpus", |s| s.vcpus = 0),
            ("nic_ports", |s| s.nic_ports = 9),
            ("cmdline", |s| s.cmdline = "a\nb".into()),
        ];
        for (field, spoil) in cases {
            let mut s = spec();
            spoil(&mut s);
            assert_eq!(s.check().expect_err("refused").field, field);
        }
    }

    proptest! {
        #[test]
        fn a_mac_round_trips(mut raw in any::<[u8; 6]>()) {
            raw[0] &= !1;
            let mac = MacAddress(raw);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn no_text_breaks_the_mac_parser(s in "\\PC{0,24}") {
            let _ = s.parse::<MacAddress>();
        }
    }
}
