//! The machine manifest: what the two ends of a state must have in common.
//!
//! QEMU loads a state into a machine of another shape without a word in several cases (a 128 MiB
//! image into 256 MiB, extra vCPUs), so every saved state keeps its manifest and a difference is
//! refused before QEMU sees it.

use godwit_types::{Code, CodedError, Hash};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::args::device_shape;
use crate::spec::MachineSpec;

/// Everything that shapes the hardware a guest sees, without any path of a host.
///
/// Two manifests are equal exactly when their canonical JSON (keys sorted, no white space) is;
/// the hash of that text is the manifest's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this form.
    pub format: u32,
    /// QEMU's version, for example `10.0.2`.
    pub qemu: String,
    /// Pinned machine type with its fixed options.
    pub machine: String,
    /// CPU model.
    pub cpu: String,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Hash of the kernel.
    pub kernel: Hash,
    /// Hash of the initramfs.
    pub initrd: Option<Hash>,
    /// Kernel command line.
    pub cmdline: String,
    /// Every fixed device as `id=model@bus:address` with its guest-visible properties.
    pub devices: Vec<String>,
}

/// A field in which two machines differ.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("machine manifest: {field} is {saved} in the saved state but {here} here")]
pub struct ManifestMismatch {
    /// The field.
    pub field: String,
    /// Its value in the state, as JSON.
    pub saved: String,
    /// Its value in the machine that was to load it, as JSON.
    pub here: String,
}

impl CodedError for ManifestMismatch {
    fn code(&self) -> Code {
        Code::Conflict
    }
}

impl Manifest {
    /// The present form.
    pub const FORMAT: u32 = 1;
    /// The largest manifest that is parsed, in bytes.
    pub const MAX_BYTES: usize = 64 << 10;

    /// The manifest of `spec` under QEMU `version`.
    #[must_use]
    pub fn of(spec: &MachineSpec, version: &str) -> Self {
        Self {
            format: Self::FORMAT,
            qemu: version.to_owned(),
            machine: crate::args::machine_option(spec),
            cpu: spec.cpu_model().to_owned(),
            memory_mib: spec.memory.0,
            vcpus: spec.vcpus,
            kernel: spec.kernel.hash,
            initrd: spec.initrd.as_ref().map(|f| f.hash),
            cmdline: spec.cmdline.clone(),
            devices: device_shape(spec),
        }
    }

    /// The canonical JSON text.
    #[must_use]
    pub fn canonical(&self) -> String {
        let mut out = String::new();
        write_canonical(&self.value(), &mut out);
        out
    }

    /// The hash of the canonical text.
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(self.canonical().as_bytes())
    }

    /// Reads a manifest that came from a file or a peer.
    ///
    /// # Errors
    /// A text over [`Manifest::MAX_BYTES`], or not of this form.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        if text.len() > Self::MAX_BYTES {
            return Err(serde::de::Error::custom("larger than a manifest may be"));
        }
        serde_json::from_slice(text)
    }

    /// Whether a state saved with `self` may be loaded into a machine with `here`. All that shapes
    /// the hardware must be equal; of QEMU's version only what [`versions_fit`] asks.
    ///
    /// # Errors
    /// The first field that differs, in order of their names.
    pub fn check(&self, here: &Self) -> Result<(), ManifestMismatch> {
        let (Value::Object(saved), Value::Object(here)) = (self.value(), here.value()) else {
            unreachable!("a manifest serialises to an object")
        };
        let mut keys: Vec<&String> = saved.keys().chain(here.keys()).collect();
        keys.sort();
        for key in keys {
            let (a, b) = (saved.get(key), here.get(key));
            let fits = match (key.as_str(), a, b) {
                ("qemu", Some(Value::String(a)), Some(Value::String(b))) => versions_fit(a, b),
                _ => a == b,
            };
            if !fits {
                return Err(differing(key, a, b));
            }
        }
        Ok(())
    }

    fn value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_else(|_| Value::Object(Map::new()))
    }
}

/// Series of QEMU whose states load in each other's machines of a pinned type, besides a series in
/// itself. Each is here because `tests/versions.rs` loads it both ways.
const PAIRS: &[(&str, &str)] = &[];

/// Whether a state that one version of QEMU has saved loads in another, both ways: versions of one
/// series (10.0.2 and 10.0.13), which change no device's form, and the pairs of series that are
/// tested.
#[must_use]
pub fn versions_fit(saved: &str, here: &str) -> bool {
    let (Some(a), Some(b)) = (series(saved), series(here)) else { return saved == here };
    a == b || PAIRS.iter().any(|pair| *pair == (a, b) || *pair == (b, a))
}

/// `10.0` of `10.0.2`.
fn series(version: &str) -> Option<&str> {
    let (series, patch) = version.rsplit_once('.')?;
    let (major, minor) = series.split_once('.')?;
    let number = |s: &str| !s.is_empty() && s.len() < 6 && s.bytes().all(|b| b.is_ascii_digit());
    [major, minor, patch].into_iter().all(number).then_some(series)
}

fn differing(key: &str, saved: Option<&Value>, here: Option<&Value>) -> ManifestMismatch {
    if let (Some(Value::Array(a)), Some(Value::Array(b))) = (saved, here) {
        let n = (0..a.len().max(b.len())).find(|&n| a.get(n) != b.get(n)).unwrap_or(0);
        return differing(&format!("{key}[{n}]"), a.get(n), b.get(n));
    }
    let show = |v: Option<&Value>| match v {
        None => "absent".to_owned(),
        Some(v) => {
            let text = v.to_string();
            match text.char_indices().nth(120) {
                Some((cut, _)) => format!("{}...", &text[..cut]),
                None => text,
            }
        }
    };
    ManifestMismatch { field: key.to_owned(), saved: show(saved), here: show(here) }
}

/// Writes `v` with sorted keys and no white space, whatever order the map keeps.
fn write_canonical(v: &Value, out: &mut String) {
    match v {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort();
            out.push('{');
            for (n, key) in keys.into_iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                out.push_str(&Value::String(key.clone()).to_string());
                out.push(':');
                write_canonical(&map[key], out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (n, item) in items.iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::spec;
    use godwit_types::Mib;
    use proptest::prelude::*;

    #[test]
    fn a_mismatch_names_the_field_and_both_values() {
        let a = Manifest::of(&spec(), "10.0.2");
        assert_eq!(a.check(&a), Ok(()));
        let mut other = spec();
        other.memory = Mib(512);
        let err = a.check(&Manifest::of(&other, "10.0.2")).expect_err("refused");
        assert_eq!(
            err.to_string(),
            "machine manifest: memory_mib is 256 in the saved state but 512 here"
        );
        let err = a.check(&Manifest::of(&spec(), "9.2.4")).expect_err("refused");
        assert_eq!(
            err.to_string(),
            "machine manifest: qemu is \"10.0.2\" in the saved state but \"9.2.4\" here"
        );
        let mut other = spec();
        other.nic_ports = 3;
        let err = a.check(&Manifest::of(&other, "10.0.2")).expect_err("refused");
        assert!(err.field.starts_with("devices["), "{err}");
        assert_eq!(err.saved, "absent");
    }

    #[test]
    fn a_patch_of_qemu_changes_nothing_and_another_series_does() {
        let (a, b) = (Manifest::of(&spec(), "10.0.2"), Manifest::of(&spec(), "10.0.13"));
        assert_eq!((a.check(&b), b.check(&a)), (Ok(()), Ok(())));
        for other in ["10.1.0", "11.0.2", "1.0.2", "10.0", "10.0.2.1", "10.0.x", ""] {
            assert!(a.check(&Manifest::of(&spec(), other)).is_err(), "{other}");
            assert!(Manifest::of(&spec(), other).check(&a).is_err(), "{other}");
        }
        assert!(versions_fit("", "") && versions_fit("10.0", "10.0"));
    }

    #[test]
    fn paths_of_the_host_do_not_change_the_hash() {
        let mut moved = spec();
        moved.kernel.path = "/elsewhere/k".into();
        let (a, b) = (Manifest::of(&spec(), "10.0.2"), Manifest::of(&moved, "10.0.2"));
        assert_eq!(a.hash(), b.hash());
        let mut other = spec();
        other.kernel.hash = Hash::of(b"another kernel");
        assert_ne!(a.hash(), Manifest::of(&other, "10.0.2").hash());
    }

    #[test]
    fn the_canonical_text_is_read_back_as_the_same_manifest() {
        let a = Manifest::of(&spec(), "10.0.2");
        let text = a.canonical();
        assert!(text.starts_with("{\"cmdline\":"), "{text}");
        assert_eq!(Manifest::parse(text.as_bytes()).expect("parsed"), a);
    }

    proptest! {
        #[test]
        fn hostile_text_is_an_error_never_a_panic(s in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::parse(&s);
        }
    }
}
