//! Small JSON files that carry their own hash on the last line, so that one changed bit is seen.
//!
//! ```text
//! { ...JSON... }
//! # blake3 9f86d081...
//! ```

use crate::Hash;

const MARK: &str = "\n# blake3 ";
/// Mark, 64 hexadecimal digits, newline.
const LINE: usize = MARK.len() + 64 + 1;

/// A file that is not the one that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its bytes have another hash than its last line says")]
pub struct SealBroken;

/// The bytes of a file with this text, its hash on the last line.
#[must_use]
pub fn seal(mut text: Vec<u8>) -> Vec<u8> {
    let hash = Hash::of(&text);
    text.extend_from_slice(format!("{MARK}{hash}\n").as_bytes());
    text
}

/// The text of a sealed file. One without that last line, as older versions wrote, is given as it
/// is; a last line that was damaged stays in the text, and no JSON parser takes it.
///
/// # Errors
/// [`SealBroken`] when the text has another hash.
pub fn unseal(file: &[u8]) -> Result<&[u8], SealBroken> {
    let Some(at) = file.len().checked_sub(LINE) else { return Ok(file) };
    let (text, line) = file.split_at(at);
    let hash = line
        .strip_prefix(MARK.as_bytes())
        .and_then(|rest| rest.strip_suffix(b"\n"))
        .and_then(|hex| std::str::from_utf8(hex).ok()?.parse::<Hash>().ok());
    match hash {
        Some(hash) if hash == Hash::of(text) => Ok(text),
        Some(_) => Err(SealBroken),
        None => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_flipped_bit_is_seen_by_the_hash_or_by_the_parser() {
        let value = serde_json::json!({ "name": "base", "bytes": 4096, "list": [1, 2, 3] });
        let sound = seal(serde_json::to_vec_pretty(&value).expect("json"));
        let read = |file: &[u8]| {
            let text = unseal(file).ok()?;
            serde_json::from_slice::<serde_json::Value>(text).ok()
        };
        assert_eq!(read(&sound), Some(value.clone()));
        for at in 0..sound.len() {
            for bit in 0..8 {
                let mut bad = sound.clone();
                bad[at] ^= 1 << bit;
                // A digit of the hash in capitals says the same.
                assert!(read(&bad).is_none_or(|v| v == value && bad[at].is_ascii_uppercase()));
            }
        }
        for cut in 1..sound.len() - LINE {
            assert_eq!(read(&sound[..cut]), None, "{cut}");
        }
        // Written by a version that sealed nothing.
        assert_eq!(read(&serde_json::to_vec(&value).expect("json")), Some(value));
    }
}
