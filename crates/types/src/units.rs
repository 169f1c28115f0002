//! Sizes. Names carry the unit where a type cannot.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a guest memory page. Both supported architectures use 4 KiB pages here.
pub const PAGE_SIZE: usize = 4096;

/// Bytes in one disk block: the "sector" of the CloudAP paper's figures 4 and 5,
/// the unit of the block bitmap and of content addressing on disks.
pub const BLOCK_SIZE: usize = 4096;

/// A size in binary megabytes.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(transparent)]
pub struct Mib(pub u32);

impl Mib {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        (self.0 as u64) << 20
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// `bytes` for people, in binary units: `31 MiB`, `6.1 MiB`, `512 B`.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 10.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_with_two_significant_figures() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(31 << 20), "31 MiB");
        assert_eq!(human_bytes(6_400_000), "6.1 MiB");
    }
}
