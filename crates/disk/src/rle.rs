//! Run-length coding of blocks, as the CloudAP paper does for disk sectors ("a 4KB sector can be
//! compressed to 54-4096 bytes"). A block that doesn't shrink goes as it is.
//!
//! A coded block is a list of pieces, each led by one control byte `c`:
//!
//! ```text
//! c < 128         c+1 bytes follow as they are
//! 128 <= c < 255  the next byte stands for c-128+3 equal ones (3..=129)
//! c == 255        a u16 (little endian) length, then the byte that is repeated
//! ```

use godwit_types::{BLOCK_SIZE, Code, CodedError};

/// A coded block that does not yield exactly one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RleError {
    /// The coded form ends within a piece.
    #[error("a run-length coded block ends early")]
    Short,
    /// It yields more or fewer bytes than a block has.
    #[error("a run-length coded block does not yield {BLOCK_SIZE} bytes")]
    WrongLength,
}

impl CodedError for RleError {
    fn code(&self) -> Code {
        Code::Damaged
    }
}

const SHORT_RUN: usize = 3;
const LONGEST_SHORT_RUN: usize = 129;

/// Codes one block and appends it to `out`; at most [`BLOCK_SIZE`] bytes are added, and exactly
/// that many mean the block as it is.
///
/// Returns the number of bytes added.
///
/// # Panics
/// If `block` is not one block long.
pub fn encode(block: &[u8], out: &mut Vec<u8>) -> usize {
    assert_eq!(block.len(), BLOCK_SIZE, "one block at a time");
    let start = out.len();
    let (mut at, mut literal) = (0, 0);
    while let Some(&[first, second, third]) = block.get(at..at + SHORT_RUN) {
        if second != third {
            // No run of three begins here nor at the next byte.
            at += 2;
            continue;
        }
        if first != second {
            at += 1;
            continue;
        }
        let byte = first;
        let run = run_length(&block[at..], byte);
        put_literal(&block[literal..at], out);
        if run <= LONGEST_SHORT_RUN {
            out.extend([(run - SHORT_RUN) as u8 + 128, byte]);
        } else {
            let [lo, hi] = (run as u16).to_le_bytes();
            out.extend([255, lo, hi, byte]);
        }
        at += run;
        literal = at;
        if out.len() - start >= BLOCK_SIZE {
            break;
        }
    }
    put_literal(&block[literal..], out);
    if out.len() - start >= BLOCK_SIZE {
        out.truncate(start);
        out.extend_from_slice(block);
    }
    out.len() - start
}

/// How many bytes at the head of `data` equal `byte`, eight at a time.
fn run_length(data: &[u8], byte: u8) -> usize {
    let wide = u64::from_ne_bytes([byte; 8]);
    let mut n = 0;
    let mut words = data.chunks_exact(8);
    for chunk in &mut words {
        let mut raw = [0; 8];
        raw.copy_from_slice(chunk);
        if u64::from_ne_bytes(raw) != wide {
            break;
        }
        n += 8;
    }
    n + data[n..].iter().take_while(|b| **b == byte).count()
}

fn put_literal(data: &[u8], out: &mut Vec<u8>) {
    for part in data.chunks(128) {
        out.push(part.len() as u8 - 1);
        out.extend_from_slice(part);
    }
}

/// Decodes one block into `block`.
///
/// # Errors
/// If `coded` ends early or does not yield exactly one block.
///
/// # Panics
/// If `block` is not one block long.
pub fn decode(coded: &[u8], block: &mut [u8]) -> Result<(), RleError> {
    assert_eq!(block.len(), BLOCK_SIZE, "one block at a time");
    if coded.len() == BLOCK_SIZE {
        block.copy_from_slice(coded);
        return Ok(());
    }
    let (mut rest, mut at) = (coded, 0);
    while let Some((&control, tail)) = rest.split_first() {
        if control < 128 {
            let n = usize::from(control) + 1;
            let (data, tail) = tail.split_at_checked(n).ok_or(RleError::Short)?;
            let to = block.get_mut(at..at + n).ok_or(RleError::WrongLength)?;
            to.copy_from_slice(data);
            (rest, at) = (tail, at + n);
            continue;
        }
        let (n, tail) = if control < 255 {
            (usize::from(control) - 128 + SHORT_RUN, tail)
        } else {
            let (len, tail) = tail.split_first_chunk::<2>().ok_or(RleError::Short)?;
            (usize::from(u16::from_le_bytes(*len)), tail)
        };
        let (&byte, tail) = tail.split_first().ok_or(RleError::Short)?;
        block.get_mut(at..at + n).ok_or(RleError::WrongLength)?.fill(byte);
        (rest, at) = (tail, at + n);
    }
    if at == BLOCK_SIZE { Ok(()) } else { Err(RleError::WrongLength) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round(block: &[u8]) -> usize {
        let mut coded = vec![7];
        let n = encode(block, &mut coded);
        assert_eq!(coded.len(), n + 1);
        let mut back = vec![1; BLOCK_SIZE];
        decode(&coded[1..], &mut back).expect("own form");
        assert_eq!(back, block);
        n
    }

    #[test]
    fn sizes_lie_between_four_bytes_and_the_block() {
        assert_eq!(round(&[0; BLOCK_SIZE]), 4);
        let noise: Vec<u8> =
            (0..BLOCK_SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        assert_eq!(round(&noise), BLOCK_SIZE);
        let mut text = b"one line of a log, ".repeat(100);
        text.resize(BLOCK_SIZE, 0);
        assert!(round(&text) < 2000);
    }

    #[test]
    fn damaged_forms_are_refused() {
        let mut block = [0; BLOCK_SIZE];
        for bad in [
            &[][..],
            &[0],
            &[5, 1, 2],
            &[255, 0],
            &[255, 0, 16],
            &[255, 1, 16, 0],
            &[200, 1],
            &[255, 255, 255, 0],
        ] {
            assert!(decode(bad, &mut block).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_block_comes_back(pieces in prop::collection::vec((any::<u8>(), 1usize..300, any::<bool>()), 1..60)) {
            let mut block = Vec::new();
            for (byte, n, run) in pieces {
                block.extend((0..n).map(|i| if run { byte } else { byte.wrapping_mul(31).wrapping_add((i * 7) as u8) }));
            }
            block.resize(BLOCK_SIZE, 0);
            round(&block);
        }

        #[test]
        fn random_bytes_never_panic(coded in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode(&coded, &mut [0; BLOCK_SIZE]);
        }
    }
}
