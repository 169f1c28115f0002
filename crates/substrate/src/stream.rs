//! The memory of a machine that maps it privately: it comes out of the saved stream.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{BlockStripper, Content, Limits};
use godwit_store::{PageMap, Writer, zero_hash};
use godwit_types::{Hash, Mib, PAGE_SIZE};

use crate::dock::{Zero, push};
use crate::error::SubstrateError;
use crate::manifest::MAX_STATE;

/// Pages put into the store in one go.
const BATCH: usize = 2048;

struct Taken<'a> {
    writer: &'a mut Writer,
    hashes: Vec<Hash>,
    numbers: Vec<usize>,
    bytes: Vec<u8>,
}

impl Taken<'_> {
    fn flush(&mut self) -> Result<(), SubstrateError> {
        let hashes = self
            .writer
            .put_units(&self.bytes)
            .map_err(SubstrateError::store("storing the memory"))?;
        for (n, h) in self.numbers.drain(..).zip(hashes) {
            self.hashes[n] = h;
        }
        self.bytes.clear();
        Ok(())
    }

    fn page(&mut self, at: u64, content: &Content) -> Result<(), SubstrateError> {
        let number = usize::try_from(at / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        if number >= self.hashes.len() {
            return Err(SubstrateError::damaged("the saved state", "it has a page too many"));
        }
        match content {
            Content::Fill(0) => self.hashes[number] = zero_hash(),
            Content::Fill(byte) => {
                self.numbers.push(number);
                self.bytes.resize(self.bytes.len() + PAGE_SIZE, *byte);
            }
            Content::Data(page) => {
                self.numbers.push(number);
                self.bytes.extend_from_slice(page);
            }
        }
        if self.numbers.len() >= BATCH { self.flush() } else { Ok(()) }
    }
}

/// Puts the memory in the stream at `path` into the store; gives its map and the rest of the
/// stream, which is the device state.
pub(crate) fn store_stream(
    writer: &mut Writer,
    path: &Path,
    memory: Mib,
) -> Result<(PageMap, Vec<u8>), SubstrateError> {
    let pages = (memory.bytes() / PAGE_SIZE as u64) as usize;
    let mut taken = Taken {
        writer,
        hashes: vec![zero_hash(); pages],
        numbers: Vec::new(),
        bytes: Vec::with_capacity(BATCH * PAGE_SIZE),
    };
    let mut file = File::open(path).map_err(SubstrateError::io("opening", path))?;
    let mut stripper = BlockStripper::new(RAM_BLOCK, Limits::default());
    let mut state = Vec::new();
    let mut buf = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buf).map_err(SubstrateError::io("reading", path))?;
        if n == 0 {
            break;
        }
        let mut failed = None;
        stripper
            .push(&buf[..n], &mut state, |at, content| {
                if failed.is_none() {
                    failed = taken.page(at, content).err();
                }
            })
            .map_err(|e| SubstrateError::Stream(Box::new(e)))?;
        if let Some(e) = failed {
            return Err(e);
        }
        if state.len() as u64 > MAX_STATE {
            return Err(SubstrateError::damaged(
                "the saved state",
                "the device state is larger than allowed",
            ));
        }
    }
    taken.flush()?;
    stripper.finish().map_err(|e| SubstrateError::Stream(Box::new(e)))?;
    let mut map = PageMap::new(pages as u64);
    push(&mut map, 0, &taken.hashes, Zero::Left)?;
    Ok((map, state))
}
