//! Just enough ELF to find the shared libraries that a program needs.

/// Names of the libraries that a 64-bit little-endian ELF file needs. `None` when the file is not
/// one or contradicts itself; a static program needs none.
pub(crate) fn needed(file: &[u8]) -> Option<Vec<String>> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let headers = usize::try_from(u64_at(file, 0x20)?).ok()?;
    let size = usize::from(u16_at(file, 0x36)?);
    let count = usize::from(u16_at(file, 0x38)?);
    let mut loads = Vec::new();
    let mut dynamic = None;
    for i in 0..count {
        let at = headers.checked_add(i.checked_mul(size)?)?;
        let (offset, address, bytes) =
            (u64_at(file, at + 8)?, u64_at(file, at + 16)?, u64_at(file, at + 32)?);
        match u32_at(file, at)? {
            1 => loads.push((address, bytes, offset)),
            2 => dynamic = Some((usize::try_from(offset).ok()?, usize::try_from(bytes).ok()?)),
            _ => {}
        }
    }
    let Some((start, bytes)) = dynamic else { return Some(Vec::new()) };
    let entries = file.get(start..start.checked_add(bytes)?)?;
    let tag = |entry: &[u8]| Some((u64_at(entry, 0)?, u64_at(entry, 8)?));
    let tags: Vec<_> = entries.chunks_exact(16).filter_map(tag).take_while(|t| t.0 != 0).collect();
    let Some(strings) = tags.iter().find(|t| t.0 == 5).map(|t| t.1) else {
        return Some(Vec::new());
    };
    let (address, _, offset) = loads.into_iter().find(|l| strings >= l.0 && strings - l.0 < l.1)?;
    let strings = (strings - address).checked_add(offset)?;
    tags.iter()
        .filter(|t| t.0 == 1)
        .map(|t| {
            let at = usize::try_from(strings.checked_add(t.1)?).ok()?;
            let rest = file.get(at..)?;
            let name = &rest[..rest.iter().take(256).position(|b| *b == 0)?];
            // A library name is one path component; anything else is not for us to open.
            let name = std::str::from_utf8(name).ok()?;
            (!name.is_empty() && !name.contains('/')).then(|| name.to_owned())
        })
        .collect()
}

fn bytes_at<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}
fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    bytes_at(file, at).map(u16::from_le_bytes)
}
fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    bytes_at(file, at).map(u32::from_le_bytes)
}
fn u64_at(file: &[u8], at: usize) -> Option<u64> {
    bytes_at(file, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn this_test_needs_libc() {
        let own = std::fs::read(std::env::current_exe().expect("a path")).expect("readable");
        assert!(needed(&own).expect("an ELF file").iter().any(|n| n == "libc.so.6"));
    }

    proptest! {
        #[test]
        fn damaged_files_do_no_harm(at in 0usize..4096, byte: u8, cut in 0usize..65536) {
            let mut own = std::fs::read("/bin/true").expect("readable");
            own.truncate(cut.max(64));
            let at = at % own.len();
            own[at] = byte;
            let _ = needed(&own);
        }
    }
}
