//! Bytes of files that went bad.

use std::os::unix::fs::FileExt;
use std::path::Path;

/// Turns one bit of the byte at `at` of a file over; called twice, the file is as it was.
pub fn flip(file: &Path, at: u64) {
    let f = std::fs::File::options().read(true).write(true).open(file).expect("a file to harm");
    let mut byte = [0];
    f.read_exact_at(&mut byte, at).expect("a byte");
    byte[0] ^= 0x10;
    f.write_all_at(&byte, at).expect("a byte");
}
