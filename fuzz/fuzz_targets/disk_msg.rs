//! A message of disk post-copy from a hostile peer, taken by both state machines.
#![no_main]

use godwit_disk::{BlockBitmap, DiskMsg, PostcopyDestination, PostcopySource};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(msg) = DiskMsg::decode(data) else { return };
    let Ok(bitmap) = BlockBitmap::full(4096) else { return };
    let mut source = PostcopySource::new(bitmap.clone());
    let destination = PostcopyDestination::new(bitmap);
    match msg {
        DiskMsg::Pull { id, range, again } => drop(source.pull(id, range, again)),
        DiskMsg::Syn(ranges) => drop(source.syn(&ranges)),
        DiskMsg::Push(run) | DiskMsg::PullReply { run, .. } => {
            let _ = destination.arrived(run.range());
            let _ = run.decode();
        }
        DiskMsg::Bitmap(part) | DiskMsg::Have(part) => {
            let _ = godwit_disk::BitmapParts::default().take(&part);
        }
        DiskMsg::Done => drop(source.released()),
    }
});
