//! The two machines against each other, over links that lose and reorder.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::bitmap::BlockBitmap;
use crate::msg::{BitmapParts, BlockRange, DiskMsg};

fn bitmap(blocks: u64, set: impl IntoIterator<Item = u64>) -> BlockBitmap {
    let mut b = BlockBitmap::new(blocks).unwrap();
    for s in set {
        b.insert(s);
    }
    b
}

fn range(first: u64, count: u64) -> BlockRange {
    BlockRange { first, count }
}

#[test]
fn push_goes_on_from_the_pivot_and_wraps_around() {
    let mut s = PostcopySource::new(bitmap(100, [1, 2, 50, 51, 52, 53, 90]));
    assert_eq!(s.next_push(), Some(ToSend::Push(range(1, 2))));
    s.pull(7, range(51, 1), false).unwrap();
    assert_eq!(s.pivot(), 51);
    assert_eq!(s.next_send(), Some(ToSend::PullReply { id: 7, range: range(51, 1) }));
    assert_eq!(s.next_send(), Some(ToSend::Push(range(52, 2))), "the blocks behind the pivot");
    assert_eq!(s.next_send(), Some(ToSend::Push(range(90, 1))));
    assert_eq!(s.next_send(), Some(ToSend::Push(range(50, 1))), "around the end");
    assert_eq!(s.next_send(), Some(ToSend::Done));
    assert_eq!(s.next_send(), None);
}

#[test]
fn a_syn_clears_and_sends_nothing() {
    let mut s = PostcopySource::new(bitmap(100, 10..20));
    s.syn(&[range(10, 9)]).unwrap();
    assert_eq!(s.counts().cancelled, 9);
    assert_eq!(s.pivot(), 0);
    assert!(s.released().is_err(), "block 19 was never sent");
    assert_eq!(s.next_send(), Some(ToSend::Push(range(19, 1))));
    s.released().unwrap();
    assert!(s.syn(&[range(99, 2)]).is_err());
    assert!(s.pull(1, range(0, 17), false).is_err());
}

#[test]
fn a_pull_of_what_is_on_its_way_sends_nothing_twice() {
    let mut s = PostcopySource::new(bitmap(64, 0..32));
    assert_eq!(s.next_push(), Some(ToSend::Push(range(0, 16))));
    s.pull(1, range(8, 16), false).unwrap();
    assert_eq!(s.next_demanded(), Some(ToSend::PullReply { id: 1, range: range(16, 8) }));
    assert_eq!(s.next_demanded(), None);
    s.pull(2, range(8, 1), true).unwrap();
    assert_eq!(s.next_demanded(), Some(ToSend::PullReply { id: 2, range: range(8, 1) }));
}

#[test]
fn a_read_of_a_cancelled_block_asks_again() {
    let mut d = PostcopyDestination::new(bitmap(8, [3]));
    d.write(3..4);
    assert_eq!(d.next_message(), Some(DiskMsg::Syn(vec![range(3, 1)])));
    assert!(d.is_complete());
    let Read::Wait(t) = d.read(0..8) else { panic!("it must wait") };
    let again = DiskMsg::Pull { id: 0, range: range(3, 1), again: true };
    assert_eq!(d.next_message(), Some(again));
    assert_eq!(d.arrived(range(3, 1)).unwrap(), vec![3..4]);
    assert_eq!(d.stored(3..4), vec![t]);
    assert_eq!(d.read(0..8), Read::Ready);
}

#[test]
fn blocks_that_nobody_marked_are_refused() {
    let d = PostcopyDestination::new(bitmap(8, [3]));
    assert!(d.arrived(range(3, 2)).is_err());
    assert!(d.arrived(range(200, 1)).is_err());
}

/// One step of a run.
#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Write(u64, u64),
    SourceSends,
    SourceServes,
    DestinationSends,
    ArriveAtSource,
    ArriveAtDestination,
    LoseLink,
}

fn step(loss: bool) -> impl Strategy<Value = Step> {
    let lose = u32::from(loss);
    prop_oneof![
        2 => (0u64..96, 1u64..24).prop_map(|(a, n)| Step::Read(a, n)),
        2 => (0u64..96, 1u64..6).prop_map(|(a, n)| Step::Write(a, n)),
        3 => Just(Step::SourceSends),
        2 => Just(Step::SourceServes),
        3 => Just(Step::DestinationSends),
        3 => Just(Step::ArriveAtSource),
        3 => Just(Step::ArriveAtDestination),
        lose => Just(Step::LoseLink),
    ]
}

const BLOCKS: u64 = 96;
const BASE: u32 = 1_000_000;
const LOCAL: u32 = 2_000_000;

/// Both ends with a link between them and the layers below the guest. A block's contents are one
/// number: at the source its own index, in the base [`BASE`] more, written locally [`LOCAL`] up.
struct World {
    sent: BlockBitmap,
    source: PostcopySource,
    destination: PostcopyDestination,
    parts: BitmapParts,
    to_destination: VecDeque<ToSend>,
    to_source: VecDeque<DiskMsg>,
    mid: Vec<Option<u32>>,
    top: Vec<Option<u32>>,
    reads: Vec<(Ticket, u64, u64)>,
    crossed: Vec<u32>,
    writes: u32,
}

impl World {
    fn new(sent: BlockBitmap) -> Self {
        Self {
            source: PostcopySource::new(sent.clone()),
            destination: PostcopyDestination::new(sent.clone()),
            sent,
            parts: BitmapParts::default(),
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            mid: vec![None; BLOCKS as usize],
            top: vec![None; BLOCKS as usize],
            reads: Vec::new(),
            crossed: vec![0; BLOCKS as usize],
            writes: 0,
        }
    }

    fn source_content(&self, b: u64) -> u32 {
        if self.sent.contains(b) { b as u32 } else { BASE + b as u32 }
    }

    /// What a reader below `top` sees.
    fn below_top(&self, b: u64) -> u32 {
        self.mid[b as usize].unwrap_or(BASE + b as u32)
    }

    fn check_read(&self, first: u64, end: u64) {
        for b in first..end {
            assert_eq!(self.below_top(b), self.source_content(b), "block {b} below top");
        }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Read(first, n) => {
                let end = (first + n).min(BLOCKS);
                match self.destination.read(first..end) {
                    Read::Ready => self.check_read(first, end),
                    Read::Wait(t) => self.reads.push((t, first, end)),
                }
            }
            Step::Write(first, n) => {
                let end = (first + n).min(BLOCKS);
                self.writes += 1;
                for b in first..end {
                    self.top[b as usize] = Some(LOCAL + self.writes);
                }
                self.destination.write(first..end);
            }
            Step::SourceSends => self.to_destination.extend(self.source.next_push()),
            Step::SourceServes => self.to_destination.extend(self.source.next_demanded()),
            Step::DestinationSends => self.to_source.extend(self.destination.next_message()),
            Step::ArriveAtSource => {
                if let Some(m) = self.to_source.pop_front() {
                    self.at_source(m);
                }
            }
            Step::ArriveAtDestination => {
                if let Some(m) = self.to_destination.pop_front() {
                    self.at_destination(m);
                }
            }
            Step::LoseLink => {
                self.to_source.clear();
                self.to_destination.clear();
                self.source.link_lost();
                self.destination.reconnected();
            }
        }
    }

    fn at_source(&mut self, m: DiskMsg) {
        let m = DiskMsg::decode(&m.encode().unwrap()).unwrap();
        match m {
            DiskMsg::Pull { id, range, again } => self.source.pull(id, range, again).unwrap(),
            DiskMsg::Syn(r) => self.source.syn(&r).unwrap(),
            DiskMsg::Have(p) => {
                let have = self.parts.take(&p).unwrap().unwrap();
                self.source.have(&have).unwrap();
            }
            DiskMsg::Done => self.source.released().unwrap(),
            m => panic!("{m:?} came from the wrong side"),
        }
    }

    fn at_destination(&mut self, m: ToSend) {
        let range = match m {
            ToSend::Done => return self.destination.source_done(),
            ToSend::Push(r) | ToSend::PullReply { range: r, .. } => r,
        };
        for b in range.blocks() {
            self.crossed[b as usize] += 1;
        }
        for fresh in self.destination.arrived(range).unwrap() {
            for b in fresh.clone() {
                self.mid[b as usize] = Some(self.source_content(b));
            }
            for t in self.destination.stored(fresh) {
                let at = self.reads.iter().position(|r| r.0 == t).expect("a known read");
                let (_, first, end) = self.reads.swap_remove(at);
                self.check_read(first, end);
            }
        }
    }

    /// Lets everything run to its end.
    fn settle(&mut self) {
        for _ in 0..100 {
            let mut moved = false;
            while let Some(m) = self.destination.next_message() {
                self.to_source.push_back(m);
            }
            while let Some(m) = self.to_source.pop_front() {
                moved = true;
                self.at_source(m);
            }
            while let Some(m) = self.source.next_send() {
                self.to_destination.push_back(m);
            }
            while let Some(m) = self.to_destination.pop_front() {
                moved = true;
                self.at_destination(m);
            }
            if !moved {
                match self.destination.finished() {
                    Some(done) => self.at_source(done),
                    None => return,
                }
            }
        }
        panic!("it does not settle");
    }

    fn check_end(&self) {
        assert!(self.destination.is_complete() && self.source.bitmap().is_empty());
        assert!(self.source.is_released() && self.reads.is_empty());
        for b in 0..BLOCKS {
            let i = b as usize;
            let seen = self.top[i].unwrap_or_else(|| self.below_top(b));
            match self.top[i] {
                Some(local) => assert_eq!(seen, local, "a push overwrote a local write"),
                None => assert_eq!(seen, self.source_content(b)),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn without_a_loss_each_block_crosses_at_most_once(
        set in prop::collection::vec(0..BLOCKS, 0..90),
        steps in prop::collection::vec(step(false), 0..160),
    ) {
        let mut w = World::new(bitmap(BLOCKS, set));
        // Reads of cancelled blocks ask again; leave them out to see the bare bound.
        let mut written = bitmap(BLOCKS, []);
        for s in &steps {
            if let Step::Read(a, n) = *s
                && written.runs_in(a..a + n).next().is_some()
            {
                continue;
            }
            if let Step::Write(a, n) = *s {
                written.set_range(a..a + n);
            }
            w.apply(s);
        }
        w.settle();
        w.check_end();
        prop_assert!(w.crossed.iter().all(|n| *n <= 1), "{:?}", w.crossed);
        prop_assert!((0..BLOCKS).all(|b| w.sent.contains(b) || w.crossed[b as usize] == 0));
    }

    #[test]
    fn with_losses_nothing_is_lost(
        set in prop::collection::vec(0..BLOCKS, 0..90),
        steps in prop::collection::vec(step(true), 0..200),
        crash_at in 0usize..200,
    ) {
        let mut w = World::new(bitmap(BLOCKS, set));
        for (i, s) in steps.iter().enumerate() {
            if i == crash_at {
                // The destination's relay dies: its record of received blocks is older than
                // `mid`, the reads it held are sent anew by QEMU.
                let kept = w.destination.received().slice(0..BLOCKS);
                w.to_source.clear();
                w.to_destination.clear();
                w.source.link_lost();
                w.destination = PostcopyDestination::resume(w.sent.clone(), &kept).unwrap();
                for (_, first, end) in std::mem::take(&mut w.reads) {
                    w.apply(&Step::Read(first, end - first));
                }
            }
            w.apply(s);
        }
        w.settle();
        w.check_end();
    }
}
