//! A bounded parser of qcow2 headers, for files that are not trusted yet.

use crate::bitmap::MAX_BLOCKS;
use godwit_types::{BLOCK_SIZE, Code, CodedError};

/// How much of a file's head [`Qcow2Header::parse`] looks at.
pub const HEADER_BYTES: usize = 64 << 10;
/// The largest virtual disk: 1 TiB.
pub const MAX_DISK_BYTES: u64 = MAX_BLOCKS * BLOCK_SIZE as u64;
/// QEMU's own bound for the L1 table.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
const MAX_BACKING_NAME: u32 = 1023;

/// Why a qcow2 file must not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Error {
    /// It is not qcow2 at all.
    #[error("it does not begin with the qcow2 magic")]
    NotQcow2,
    /// Neither version 2 nor 3.
    #[error("qcow2 version {0} is not known")]
    Version(u32),
    /// It ends within its header.
    #[error("its header is cut short")]
    Short,
    /// A field is outside of what is sane.
    #[error("its header field {0} is out of bounds")]
    Field(&'static str),
    /// It names a backing file that is not the one expected.
    #[error("it names the backing file {0:?}, which does not belong to this chain")]
    ForeignBacking(String),
    /// It keeps its data in another file.
    #[error("it keeps its data in an external file")]
    ExternalData,
    /// It is encrypted.
    #[error("it is encrypted")]
    Encrypted,
    /// It has internal snapshots.
    #[error("it has internal snapshots")]
    Snapshots,
    /// It was not closed well, or was found corrupt.
    #[error("it is marked {0}: run `qemu-img check -r all` on a copy of it")]
    Marked(&'static str),
    /// It needs features that are not known or not supported here.
    #[error("it needs features that are not supported (bits {0:#x})")]
    Features(u64),
}

impl CodedError for Qcow2Error {
    fn code(&self) -> Code {
        match self {
            Self::Short | Self::Field(_) | Self::Marked(_) => Code::Damaged,
            _ => Code::Invalid,
        }
    }
}

/// What a qcow2 file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the virtual disk.
    pub virtual_bytes: u64,
    /// Bytes in a cluster.
    pub cluster_bytes: u64,
    /// The backing file's name as it stands in the file. Never opened by that name here.
    pub backing: Option<String>,
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn u32(&self, at: usize) -> Result<u32, Qcow2Error> {
        let raw = self.0.get(at..).and_then(|d| d.first_chunk()).ok_or(Qcow2Error::Short)?;
        Ok(u32::from_be_bytes(*raw))
    }

    fn u64(&self, at: usize) -> Result<u64, Qcow2Error> {
        let raw = self.0.get(at..).and_then(|d| d.first_chunk()).ok_or(Qcow2Error::Short)?;
        Ok(u64::from_be_bytes(*raw))
    }
}

impl Qcow2Header {
    /// Reads the header in `head`, the first [`HEADER_BYTES`] (or all) of a file of `file_bytes`
    /// bytes, and refuses whatever reaches out of the file or is not needed here.
    ///
    /// # Errors
    /// Says what is wrong. A backing file name is reported, not judged; see
    /// [`crate::image::inspect`].
    pub fn parse(head: &[u8], file_bytes: u64) -> Result<Self, Qcow2Error> {
        let h = Bytes(head);
        if head.get(..4) != Some(b"QFI\xfb") {
            return Err(Qcow2Error::NotQcow2);
        }
        let version = h.u32(4)?;
        if !(2..=3).contains(&version) {
            return Err(Qcow2Error::Version(version));
        }
        let (backing_at, backing_len) = (h.u64(8)?, h.u32(16)?);
        let cluster_bits = h.u32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Qcow2Error::Field("cluster_bits"));
        }
        let cluster_bytes = 1u64 << cluster_bits;
        let virtual_bytes = h.u64(24)?;
        if virtual_bytes == 0 || virtual_bytes > MAX_DISK_BYTES {
            return Err(Qcow2Error::Field("size"));
        }
        if h.u32(32)? != 0 {
            return Err(Qcow2Error::Encrypted);
        }
        Self::check_tables(&h, file_bytes, cluster_bytes, virtual_bytes)?;
        let header_len = if version == 3 { Self::check_v3(&h, cluster_bytes)? } else { 72 };
        Self::check_extensions(&h, header_len, backing_at, cluster_bytes)?;
        let backing = Self::backing_name(head, backing_at, backing_len, cluster_bytes)?;
        Ok(Self { version, virtual_bytes, cluster_bytes, backing })
    }

    fn check_tables(
        h: &Bytes<'_>,
        file_bytes: u64,
        cluster_bytes: u64,
        virtual_bytes: u64,
    ) -> Result<(), Qcow2Error> {
        let inside = |at: u64, len: u64| {
            at.is_multiple_of(cluster_bytes)
                && at >= cluster_bytes
                && at.checked_add(len).is_some_and(|end| end <= file_bytes)
        };
        let (l1_entries, l1_at) = (u64::from(h.u32(36)?), h.u64(40)?);
        let needed = virtual_bytes.div_ceil(cluster_bytes * (cluster_bytes / 8));
        if l1_entries < needed || l1_entries * 8 > MAX_L1_BYTES || !inside(l1_at, l1_entries * 8) {
            return Err(Qcow2Error::Field("l1_table"));
        }
        let (ref_at, ref_clusters) = (h.u64(48)?, u64::from(h.u32(56)?));
        let ref_bytes = ref_clusters * cluster_bytes;
        if ref_clusters == 0 || ref_bytes > MAX_REFTABLE_BYTES || !inside(ref_at, ref_bytes) {
            return Err(Qcow2Error::Field("refcount_table"));
        }
        if h.u32(60)? != 0 {
            return Err(Qcow2Error::Snapshots);
        }
        Ok(())
    }

    fn check_v3(h: &Bytes<'_>, cluster_bytes: u64) -> Result<u64, Qcow2Error> {
        let features = h.u64(72)?;
        if features & 4 != 0 {
            return Err(Qcow2Error::ExternalData);
        }
        if features & !3 != 0 {
            return Err(Qcow2Error::Features(features & !3));
        }
        if features & 1 != 0 {
            return Err(Qcow2Error::Marked("dirty"));
        }
        if features & 2 != 0 {
            return Err(Qcow2Error::Marked("corrupt"));
        }
        if h.u32(96)? > 6 {
            return Err(Qcow2Error::Field("refcount_order"));
        }
        let len = u64::from(h.u32(100)?);
        if len < 104 || len % 8 != 0 || len > cluster_bytes {
            return Err(Qcow2Error::Field("header_length"));
        }
        Ok(len)
    }

    fn check_extensions(
        h: &Bytes<'_>,
        header_len: u64,
        backing_at: u64,
        cluster_bytes: u64,
    ) -> Result<(), Qcow2Error> {
        let end = if backing_at == 0 { cluster_bytes } else { backing_at.min(cluster_bytes) };
        let end = end.min(HEADER_BYTES as u64);
        let mut at = header_len;
        while at + 8 <= end {
            let (kind, len) = (h.u32(at as usize)?, u64::from(h.u32(at as usize + 4)?));
            match kind {
                0 => return Ok(()),
                0x4441_5441 => return Err(Qcow2Error::ExternalData),
                0x0537_be77 => return Err(Qcow2Error::Encrypted),
                _ => {}
            }
            if len > end - at - 8 {
                return Err(Qcow2Error::Field("extension"));
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    fn backing_name(
        head: &[u8],
        at: u64,
        len: u32,
        cluster_bytes: u64,
    ) -> Result<Option<String>, Qcow2Error> {
        if at == 0 {
            return Ok(None);
        }
        let bad = Qcow2Error::Field("backing_file");
        let end = at.checked_add(u64::from(len)).ok_or(bad.clone())?;
        if len == 0 || len > MAX_BACKING_NAME || end > cluster_bytes {
            return Err(bad);
        }
        let raw = head.get(at as usize..end as usize).ok_or(Qcow2Error::Short)?;
        String::from_utf8(raw.to_vec()).map(Some).map_err(|_| bad)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<u8> {
        let mut h = vec![0u8; 8192];
        h[..4].copy_from_slice(b"QFI\xfb");
        let mut put = |at: usize, data: &[u8]| h[at..at + data.len()].copy_from_slice(data);
        put(4, &3u32.to_be_bytes());
        put(20, &12u32.to_be_bytes());
        put(24, &(8u64 << 20).to_be_bytes());
        put(36, &4u32.to_be_bytes());
        put(40, &8192u64.to_be_bytes());
        put(48, &4096u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        h
    }

    fn with(at: usize, data: &[u8]) -> Result<Qcow2Header, Qcow2Error> {
        let mut h = sample();
        h[at..at + data.len()].copy_from_slice(data);
        Qcow2Header::parse(&h, 16384)
    }

    #[test]
    fn a_plain_header_is_read() {
        let h = with(0, b"QFI\xfb").expect("sound");
        assert_eq!((h.version, h.virtual_bytes, h.cluster_bytes), (3, 8 << 20, 4096));
        assert_eq!(h.backing, None);
    }

    #[test]
    fn each_way_out_of_the_file_is_refused() {
        use Qcow2Error as E;
        assert_eq!(with(0, b"QFI\xfa"), Err(E::NotQcow2));
        assert_eq!(with(7, &[4]), Err(E::Version(4)));
        assert_eq!(with(23, &[60]), Err(E::Field("cluster_bits")));
        assert_eq!(with(24, &u64::MAX.to_be_bytes()), Err(E::Field("size")));
        assert_eq!(with(35, &[1]), Err(E::Encrypted));
        assert_eq!(with(36, &u32::MAX.to_be_bytes()), Err(E::Field("l1_table")));
        assert_eq!(with(40, &u64::MAX.to_be_bytes()), Err(E::Field("l1_table")));
        assert_eq!(with(56, &u32::MAX.to_be_bytes()), Err(E::Field("refcount_table")));
        assert_eq!(with(63, &[1]), Err(E::Snapshots));
        assert_eq!(with(79, &[4]), Err(E::ExternalData));
        assert_eq!(with(79, &[1]), Err(E::Marked("dirty")));
        assert_eq!(with(79, &[2]), Err(E::Marked("corrupt")));
        assert_eq!(with(79, &[16]), Err(E::Features(16)));
        assert_eq!(with(104, b"DATA\0\0\0\x04"), Err(E::ExternalData));
        assert_eq!(with(104, b"\x01\x02\x03\x04\xff\xff\xff\xff"), Err(E::Field("extension")));
        assert_eq!(with(8, &u64::MAX.to_be_bytes()), Err(E::Field("backing_file")));
        assert_eq!(Qcow2Header::parse(&sample()[..90], 16384), Err(E::Short));
    }

    proptest! {
        #[test]
        fn random_changes_never_panic(changes in prop::collection::vec((0usize..200, any::<u8>()), 0..20), len in 0usize..8192) {
            let mut h = sample();
            for (at, b) in changes {
                h[at] = b;
            }
            let _ = Qcow2Header::parse(&h[..len], len as u64);
        }
    }
}
