//! Debian's x86-64 kernel, unpacked: decompressing it while the image is built saves seconds of
//! every boot under emulation. QEMU starts the ELF file through its PVH entry point.

use crate::{ImageError, tool};

/// What a kernel image holds.
enum Payload<'a> {
    Zstd(&'a [u8]),
    Xz(&'a [u8]),
    /// Nothing that is known: boot the file as it is.
    Other,
}

/// The compressed kernel inside a bzImage, by the boot protocol's `payload_offset` (version 2.08).
fn payload(file: &[u8]) -> Payload<'_> {
    let find = || {
        let u32_at = |at: usize| {
            let bytes = file.get(at..at + 4)?.try_into().ok()?;
            usize::try_from(u32::from_le_bytes(bytes)).ok()
        };
        if file.get(0x202..0x206)? != b"HdrS" || *file.get(0x207)? < 2 || *file.get(0x206)? < 8 {
            return None;
        }
        let setup_sectors = match *file.get(0x1f1)? {
            0 => 4,
            n => usize::from(n),
        };
        let start = ((setup_sectors + 1) * 512).checked_add(u32_at(0x248)?)?;
        // The last four bytes are the unpacked size.
        file.get(start..start.checked_add(u32_at(0x24c)?)?.checked_sub(4)?)
    };
    match find() {
        Some(data) if data.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) => Payload::Zstd(data),
        Some(data) if data.starts_with(b"\xfd7zXZ\0") => Payload::Xz(data),
        _ => Payload::Other,
    }
}

/// The kernel to boot for the kernel file that a package holds: unpacked where that is possible.
pub(crate) async fn bootable(file: Vec<u8>) -> Result<Vec<u8>, ImageError> {
    let bad = |why: String| ImageError::Package { what: "the kernel".into(), why };
    let unpacked = match payload(&file) {
        Payload::Zstd(data) => {
            zstd::decode_all(data).map_err(|e| bad(format!("its zstd payload is damaged: {e}")))?
        }
        Payload::Xz(data) => {
            let part = tempfile::NamedTempFile::new()
                .map_err(ImageError::io("writing", "a temporary file"))?;
            std::fs::write(part.path(), data).map_err(ImageError::io("writing", part.path()))?;
            tool::xz_decompress(part.path()).await?
        }
        Payload::Other => return Ok(file),
    };
    if has_pvh_entry(&unpacked) { Ok(unpacked) } else { Ok(file) }
}

/// Whether an ELF kernel carries the Xen note 18 (`PHYS32_ENTRY`), which is PVH's entry point.
fn has_pvh_entry(elf: &[u8]) -> bool {
    const NOTE: &[u8] = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
    elf.starts_with(b"\x7fELF") && elf.windows(NOTE.len()).any(|w| w == NOTE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0u8; 2 * 512 + 16];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
        file.extend_from_slice(payload);
        file.extend_from_slice(&[0; 4]);
        file
    }

    #[tokio::test]
    async fn a_pvh_kernel_is_unpacked() {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend_from_slice(b"....\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0entry...");
        let packed = zstd::encode_all(elf.as_slice(), 1).expect("compresses");
        assert_eq!(bootable(bz_image(&packed)).await.expect("sound"), elf);
    }

    #[tokio::test]
    async fn any_other_kernel_stays_as_it_is() {
        let plain = b"\x7fELF but no note".to_vec();
        let file = bz_image(&zstd::encode_all(plain.as_slice(), 1).expect("compresses"));
        assert_eq!(bootable(file.clone()).await.expect("sound"), file);
        assert_eq!(bootable(vec![7; 40]).await.expect("short"), vec![7; 40]);
    }

    #[tokio::test]
    async fn a_damaged_payload_is_an_error() {
        let mut file = bz_image(&zstd::encode_all(&[1u8; 5000][..], 1).expect("compresses"));
        let at = file.len() - 12;
        file[at..].fill(0xff);
        assert!(bootable(file).await.is_err());
    }
}
