//! A qcow2 header from anywhere: parsed or refused, never a panic or an endless loop.
#![no_main]

use godwit_disk::image::{MAX_DISK_BYTES, Qcow2Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = Qcow2Header::parse(data, data.len() as u64) {
        assert!(header.virtual_bytes <= MAX_DISK_BYTES);
        assert!(header.cluster_bytes.is_power_of_two());
    }
});
