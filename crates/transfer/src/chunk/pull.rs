//! The receiver's core. Sans-IO: wishes and messages in, effects out.
//!
//! ```text
//!             want               window has room            Unit
//!  (unknown) ------> waiting --------------------> asked ---------> done
//!                     ^  |  urgent: to the front     |  Missing
//!                     |  +--------<------------------+---------> missing
//!                     +---- the link was cut --------+
//! ```

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use godwit_types::Hash;

use super::{ChunkError, ChunkMsg, MAX_HASHES, MAX_UNIT};
use crate::codec::unpack;
use crate::wire::WireError;

/// How soon a unit is wanted; also the lane on which it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Some time.
    Background,
    /// Somebody waits.
    Demand,
}

/// Bounds of a [`Puller`].
#[derive(Debug, Clone, Copy)]
pub struct PullerConfig {
    /// Units asked for in the background and not here yet. Default 1024: 4 MiB of pages, which
    /// fills 100 Mbit/s at 200 ms.
    pub background_in_flight: usize,
    /// Units demanded and not here yet. Default 512.
    pub demand_in_flight: usize,
}

impl Default for PullerConfig {
    fn default() -> Self {
        Self { background_in_flight: 1024, demand_in_flight: 512 }
    }
}

/// A unit that came and was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its hash.
    pub hash: Hash,
    /// Its content.
    pub data: Bytes,
}

/// What the skin has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Send this on the lane of that urgency.
    Send(Urgency, ChunkMsg),
    /// Keep this unit.
    Keep(Unit),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting(Urgency),
    Asked(Urgency),
}

/// What is wanted, what was asked for, what is done.
#[derive(Debug)]
pub struct Puller {
    config: PullerConfig,
    background_limit: usize,
    states: HashMap<Hash, State>,
    demand: VecDeque<Hash>,
    background: VecDeque<Hash>,
    asked: [usize; 2],
    /// Asked for twice (background, then demand): the second copy is dropped quietly.
    expected_twice: HashSet<Hash>,
    missing: Vec<Hash>,
    kept: u64,
    duplicates: u64,
}

impl Puller {
    /// Wants nothing yet.
    #[must_use]
    pub fn new(config: PullerConfig) -> Self {
        Self {
            config,
            background_limit: config.background_in_flight,
            states: HashMap::new(),
            demand: VecDeque::new(),
            background: VecDeque::new(),
            asked: [0; 2],
            expected_twice: HashSet::new(),
            missing: Vec::new(),
            kept: 0,
            duplicates: 0,
        }
    }

    /// Adds units that are lacking here. One that is wanted already is not asked for twice,
    /// unless it becomes urgent while its background answer is still queued at the sender.
    pub fn want(&mut self, hashes: impl IntoIterator<Item = Hash>, urgency: Urgency) {
        for hash in hashes {
            match self.states.get(&hash).copied() {
                None => {
                    self.states.insert(hash, State::Waiting(urgency));
                    self.queue(urgency).push_back(hash);
                }
                Some(State::Waiting(Urgency::Background)) if urgency == Urgency::Demand => {
                    // Its place in the background queue is skipped when it is reached.
                    self.states.insert(hash, State::Waiting(Urgency::Demand));
                    self.demand.push_back(hash);
                }
                Some(State::Asked(Urgency::Background)) if urgency == Urgency::Demand => {
                    self.asked[0] -= 1;
                    self.expected_twice.insert(hash);
                    self.states.insert(hash, State::Waiting(Urgency::Demand));
                    self.demand.push_back(hash);
                }
                Some(_) => {}
            }
        }
    }

    /// Gives up units that are no longer needed.
    pub fn cancel(&mut self, hashes: &[Hash]) -> Vec<Effect> {
        let mut asked: [Vec<Hash>; 2] = [Vec::new(), Vec::new()];
        for hash in hashes {
            if let Some(State::Asked(urgency)) = self.states.remove(hash) {
                self.asked[urgency as usize] -= 1;
                self.expected_twice.insert(*hash);
                asked[urgency as usize].push(*hash);
            }
        }
        let [background, demand] = asked;
        let mut effects = cancels(Urgency::Background, &background);
        effects.extend(cancels(Urgency::Demand, &demand));
        effects
    }

    /// Sets how many units may be asked for in the background from now on (at least one, at most
    /// the configured bound): the skin follows a [`crate::Window`].
    pub fn limit_background(&mut self, units: usize) {
        self.background_limit = units.clamp(1, self.config.background_in_flight.max(1));
    }

    /// What to ask for now: demands first, then background, as far as the bounds allow.
    pub fn ask(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut overtaken = Vec::new();
        for urgency in [Urgency::Demand, Urgency::Background] {
            let limit = match urgency {
                Urgency::Demand => self.config.demand_in_flight,
                Urgency::Background => self.background_limit,
            };
            // Few large requests rather than many of one unit each.
            let batch_worth = if urgency == Urgency::Demand { 1 } else { limit.div_ceil(8).max(1) };
            let room = limit.saturating_sub(self.asked[urgency as usize]);
            let small_rest = self.queue(urgency).len() < batch_worth;
            if room == 0 || (room < batch_worth && !small_rest) {
                continue;
            }
            let mut batch = Vec::new();
            while batch.len() < room.min(MAX_HASHES) {
                let Some(hash) = self.queue(urgency).pop_front() else { break };
                if self.states.get(&hash) == Some(&State::Waiting(urgency)) {
                    self.states.insert(hash, State::Asked(urgency));
                    self.asked[urgency as usize] += 1;
                    if urgency == Urgency::Demand && self.expected_twice.contains(&hash) {
                        overtaken.push(hash);
                    }
                    batch.push(hash);
                }
            }
            if !batch.is_empty() {
                effects.push(Effect::Send(urgency, ChunkMsg::Want(batch)));
            }
        }
        effects.extend(cancels(Urgency::Background, &overtaken));
        effects
    }

    /// Takes a message from the sender.
    ///
    /// # Errors
    /// [`ChunkError::Damaged`], [`ChunkError::Codec`], [`ChunkError::Wire`] for a message that a
    /// sender may not send or a unit that nobody asked for.
    pub fn on_message(&mut self, message: ChunkMsg) -> Result<Vec<Effect>, ChunkError> {
        match message {
            ChunkMsg::Unit { hash, raw_len, packed } => {
                let state = self.states.get(&hash).copied();
                if state.is_none() || state == Some(State::Waiting(Urgency::Background)) {
                    if self.expected_twice.remove(&hash) {
                        self.duplicates += 1;
                        return Ok(Vec::new());
                    }
                    return Err(unasked());
                }
                let data = unpack(&packed, raw_len as usize, MAX_UNIT)
                    .map_err(|source| ChunkError::Codec { hash, source })?;
                if Hash::of(&data) != hash {
                    return Err(ChunkError::Damaged(hash));
                }
                if let Some(State::Asked(urgency)) = self.states.remove(&hash) {
                    self.asked[urgency as usize] -= 1;
                }
                self.kept += 1;
                Ok(vec![Effect::Keep(Unit { hash, data })])
            }
            ChunkMsg::Missing(hashes) => {
                for hash in hashes {
                    match self.states.get(&hash).copied() {
                        Some(State::Asked(urgency)) => {
                            self.states.remove(&hash);
                            self.asked[urgency as usize] -= 1;
                            self.missing.push(hash);
                        }
                        // The answer to the request that a demand overtook.
                        _ if self.expected_twice.remove(&hash) => {}
                        _ => return Err(unasked()),
                    }
                }
                Ok(Vec::new())
            }
            _ => {
                Err(WireError::Bounds { what: "chunk message", why: "only a receiver sends it" }
                    .into())
            }
        }
    }

    /// The lanes are gone: all that was asked for is wanted again, in front of the rest.
    pub fn on_disconnected(&mut self) {
        for (hash, state) in &mut self.states {
            if let State::Asked(urgency) = *state {
                *state = State::Waiting(urgency);
                match urgency {
                    Urgency::Demand => self.demand.push_front(*hash),
                    Urgency::Background => self.background.push_front(*hash),
                }
            }
        }
        self.asked = [0; 2];
        self.expected_twice.clear();
    }

    /// Nothing is waited for any more.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.states.is_empty()
    }

    /// How many units are still wanted.
    #[must_use]
    pub fn left(&self) -> usize {
        self.states.len()
    }

    /// Units that the sender does not have.
    #[must_use]
    pub fn missing(&self) -> &[Hash] {
        &self.missing
    }

    /// Units that came, and copies of them that were dropped.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.kept, self.duplicates)
    }

    fn queue(&mut self, urgency: Urgency) -> &mut VecDeque<Hash> {
        match urgency {
            Urgency::Demand => &mut self.demand,
            Urgency::Background => &mut self.background,
        }
    }
}

fn unasked() -> ChunkError {
    WireError::Bounds { what: "chunk message", why: "it answers what was not asked" }.into()
}

fn cancels(urgency: Urgency, hashes: &[Hash]) -> Vec<Effect> {
    hashes
        .chunks(MAX_HASHES)
        .map(|some| Effect::Send(urgency, ChunkMsg::Cancel(some.to_vec())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Supplier;
    use crate::codec::Packer;
    use proptest::prelude::*;

    fn page(n: u32) -> Vec<u8> {
        n.to_le_bytes().repeat(1024)
    }

    fn hash(n: u32) -> Hash {
        Hash::of(&page(n))
    }

    fn unit(n: u32) -> ChunkMsg {
        let page = page(n);
        ChunkMsg::Unit { hash: Hash::of(&page), raw_len: 4096, packed: Packer::new().pack(&page) }
    }

    #[test]
    fn demands_are_asked_for_first_and_nothing_twice() {
        let mut p = Puller::new(PullerConfig { background_in_flight: 4, demand_in_flight: 4 });
        p.want((0..10).map(hash), Urgency::Background);
        p.want([hash(7), hash(7)], Urgency::Demand);
        let asked = p.ask();
        assert_eq!(asked[0], Effect::Send(Urgency::Demand, ChunkMsg::Want(vec![hash(7)])));
        assert_eq!(
            asked[1],
            Effect::Send(Urgency::Background, ChunkMsg::Want((0..4).map(hash).collect()))
        );
        assert_eq!(p.ask(), []);
        assert_eq!(p.on_message(unit(7)).expect("good").len(), 1);
    }

    #[test]
    fn an_overtaken_background_unit_is_cancelled_and_its_copy_dropped() {
        let mut p = Puller::new(PullerConfig::default());
        p.want([hash(1)], Urgency::Background);
        p.ask();
        p.want([hash(1)], Urgency::Demand);
        assert_eq!(
            p.ask(),
            [
                Effect::Send(Urgency::Demand, ChunkMsg::Want(vec![hash(1)])),
                Effect::Send(Urgency::Background, ChunkMsg::Cancel(vec![hash(1)])),
            ]
        );
        assert_eq!(p.on_message(unit(1)).expect("good").len(), 1);
        assert_eq!(p.on_message(unit(1)).expect("a copy"), []);
        assert!(p.is_done());
        assert_eq!(p.counts(), (1, 1));
        assert!(p.on_message(unit(1)).is_err(), "a third was never asked for");
    }

    #[test]
    fn a_damaged_unit_is_named() {
        let mut p = Puller::new(PullerConfig::default());
        p.want([hash(1)], Urgency::Demand);
        p.ask();
        let ChunkMsg::Unit { packed, .. } = unit(2) else { unreachable!() };
        let wrong = ChunkMsg::Unit { hash: hash(1), raw_len: 4096, packed };
        assert!(matches!(p.on_message(wrong), Err(ChunkError::Damaged(h)) if h == hash(1)));
    }

    proptest! {
        /// Whatever is wanted in whatever order, with cuts in between: everything that the sender
        /// has comes exactly once, and the rest is reported.
        #[test]
        fn everything_comes_once(
            wants in proptest::collection::vec((0u32..60, any::<bool>()), 1..80),
            cuts in proptest::collection::vec(1usize..30, 0..4),
        ) {
            let mut p = Puller::new(PullerConfig { background_in_flight: 8, demand_in_flight: 4 });
            let mut lanes = [Supplier::new(), Supplier::new()];
            let mut got = HashSet::new();
            let mut steps = 0usize;
            let mut cuts = cuts.into_iter();
            let mut cut = cuts.next();
            let mut wants = wants.into_iter().peekable();
            while wants.peek().is_some() || !p.is_done() {
                if let Some((n, urgent)) = wants.next()
                    && !got.contains(&hash(n)) && !p.missing().contains(&hash(n))
                {
                    p.want([hash(n)], if urgent { Urgency::Demand } else { Urgency::Background });
                }
                for effect in p.ask() {
                    if let Effect::Send(urgency, message) = effect {
                        lanes[urgency as usize].on_message(message).expect("good");
                    }
                }
                for lane in lanes.iter_mut().rev() {
                    let Some(h) = lane.next_batch(1).first().copied() else { continue };
                    let n = (0..60).find(|n| hash(*n) == h).expect("known");
                    // The sender lacks every seventh.
                    let reply = if n % 7 == 6 { ChunkMsg::Missing(vec![h]) } else { unit(n) };
                    for effect in p.on_message(reply).expect("good") {
                        if let Effect::Keep(unit) = effect {
                            prop_assert!(got.insert(unit.hash), "a unit came twice");
                        }
                    }
                }
                steps += 1;
                if cut.is_some_and(|at| steps >= at) {
                    cut = cuts.next().map(|more| steps + more);
                    p.on_disconnected();
                    lanes = [Supplier::new(), Supplier::new()];
                }
                prop_assert!(steps < 2000, "it does not end");
            }
        }
    }
}
