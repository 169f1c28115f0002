//! Units are brought over a real link: only what is lacking, demands first, through a cut.

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::{Cloud, within};
use godwit_transfer::chunk::{
    ChunkError, ChunkSink, ChunkSource, PullHandle, Unit, ask_lacking, pull, supply_lane,
};
use godwit_transfer::{Link, WireError};
use godwit_types::Hash;

#[derive(Default)]
struct Memory {
    units: Mutex<HashMap<Hash, Bytes>>,
    order: Mutex<Vec<Hash>>,
}

impl Memory {
    fn with(pages: impl Iterator<Item = u32>) -> Arc<Self> {
        let memory = Self::default();
        for n in pages {
            let page = page(n);
            memory.units.lock().expect("lock").insert(Hash::of(&page), page);
        }
        Arc::new(memory)
    }
}

fn page(n: u32) -> Bytes {
    // Half of it compresses, half does not.
    let mut x = u64::from(n) + 1;
    let page: Vec<u8> = (0..4096)
        .map(|i| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if i < 2048 { n as u8 } else { (x >> 33) as u8 }
        })
        .collect();
    page.into()
}

impl ChunkSource for Memory {
    type Error = WireError;
    fn load(&self, hashes: &[Hash]) -> Result<Vec<Option<Bytes>>, WireError> {
        let units = self.units.lock().expect("lock");
        Ok(hashes.iter().map(|h| units.get(h).cloned()).collect())
    }
    fn holds(&self, hashes: &[Hash]) -> Result<Vec<bool>, WireError> {
        let units = self.units.lock().expect("lock");
        Ok(hashes.iter().map(|h| units.contains_key(h)).collect())
    }
}

impl ChunkSink for Memory {
    type Error = WireError;
    fn lacking(&self, hashes: &[Hash]) -> Result<Vec<bool>, WireError> {
        Ok(self.holds(hashes)?.into_iter().map(|held| !held).collect())
    }
    fn keep(&self, units: Vec<Unit>) -> Result<(), WireError> {
        for unit in units {
            self.order.lock().expect("lock").push(unit.hash);
            let twice = self.units.lock().expect("lock").insert(unit.hash, unit.data);
            assert!(twice.is_none(), "a unit came twice");
        }
        Ok(())
    }
}

fn supply(link: Link, source: Arc<Memory>) {
    tokio::spawn(async move {
        while let Ok(lane) = link.accept_lane().await {
            tokio::spawn(supply_lane(lane, source.clone()));
        }
    });
}

fn hashes(pages: std::ops::Range<u32>) -> Vec<Hash> {
    pages.map(|n| Hash::of(&page(n))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_lacking_crosses_and_demands_overtake() {
    let cloud = Cloud::new();
    let (near, far) = cloud.pair().await;
    let source = Memory::with(0..3000);
    supply(far, source);
    let sink = Memory::with(0..1000);
    let (handle, mut demands) = PullHandle::new();
    let wanted = Hash::of(&page(2999));
    assert!(handle.demand(vec![wanted]).await);
    let all = hashes(0..3000);
    let report =
        within(pull(&near, Bytes::from_static(b"s"), &all, sink.clone(), &handle, &mut demands))
            .await
            .expect("pull");
    assert_eq!((report.came, report.known), (2000, 1000));
    assert!(report.wire_bytes < report.raw_bytes, "{report:?}");
    let place = sink.order.lock().expect("lock").iter().position(|h| *h == wanted);
    assert!(place.is_some_and(|p| p < 1500), "the demand came as number {place:?}");
    let lacking = within(ask_lacking(&near, Bytes::new(), &hashes(2990..3010))).await.expect("ask");
    assert_eq!(lacking.iter().filter(|lacks| **lacks).count(), 10);
    assert!(!lacking[0] && lacking[19]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_sender_lacks_is_named_after_the_rest_has_come() {
    let cloud = Cloud::new();
    let (near, far) = cloud.pair().await;
    supply(far, Memory::with(0..50));
    let sink = Memory::with(0..0);
    let (handle, mut demands) = PullHandle::new();
    let all = hashes(0..51);
    let error = within(pull(&near, Bytes::new(), &all, sink.clone(), &handle, &mut demands))
        .await
        .expect_err("one is missing");
    assert!(
        matches!(error, ChunkError::Missing { count: 1, first } if first == all[50]),
        "{error}"
    );
    assert_eq!(sink.units.lock().expect("lock").len(), 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_was_cut_goes_on_where_it_stopped() {
    let cloud = Cloud::new();
    let source = Memory::with(0..4000);
    let sink = Memory::with(0..0);
    let all = hashes(0..4000);
    let (near, far) = cloud.pair().await;
    supply(far.clone(), source.clone());
    let (handle, mut demands) = PullHandle::new();
    let watched = sink.clone();
    let cutter = tokio::spawn(async move {
        while watched.order.lock().expect("lock").len() < 200 {
            tokio::task::yield_now().await;
        }
        far.close("cut");
    });
    let first = within(pull(&near, Bytes::new(), &all, sink.clone(), &handle, &mut demands)).await;
    cutter.await.expect("cutter");
    let before = sink.order.lock().expect("lock").len();
    if first.is_err() {
        let (near, far) = cloud.pair().await;
        supply(far, source);
        let report = within(pull(&near, Bytes::new(), &all, sink.clone(), &handle, &mut demands))
            .await
            .expect("the second pull");
        assert_eq!(report.known as usize, before);
    }
    assert_eq!(sink.units.lock().expect("lock").len(), 4000);
    handle.cancel();
    let (near, _far) = cloud.pair().await;
    let error = pull(&near, Bytes::new(), &hashes(4000..4001), sink, &handle, &mut demands)
        .await
        .expect_err("cancelled");
    assert!(matches!(error, ChunkError::Cancelled), "{error}");
}
