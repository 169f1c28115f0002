//! What relays say to each other on the steering lane.

use std::time::Duration;

use bytes::Bytes;
use godwit_transfer::wire::{decode, decode_open, encode};
use godwit_transfer::{LaneReceiver, LaneSender};
use godwit_types::{Generation, Hash, MigrationId};
use serde::{Deserialize, Serialize};

use super::RelayError;
use super::visit::Visit;
use crate::clock::ClockId;

/// The newest version of what relays say. 1: first. 2: the clocks of both hosts are compared. 3: frames
/// refer to memory that both hold. 4: frames refer to what the machine left at its destination.
pub(crate) const NEWEST: u16 = 4;
/// The oldest that is still spoken.
pub(crate) const OLDEST: u16 = 2;
/// From this version on frames may refer to memory that both hold.
pub(crate) const REFERS: u16 = 3;
/// From this version on frames may refer to what the machine left when it was at its destination.
pub(crate) const VISITS: u16 = 4;
/// The longest reason that is passed on, in bytes.
const MAX_WHY: usize = 1000;

/// The newest version that the relay at the other end of a link knows, by the version of the link's
/// protocol that both greetings agreed on. A newer version of what relays say comes with a newer
/// one of that, and is entered here: a relay of before compares the whole `about` byte for byte.
pub(crate) const fn known_by_peer(link: u16) -> u16 {
    match link {
        0..=3 => 2,
        4 => 3,
        _ => NEWEST,
    }
}

/// Who a migration's lanes belong to; the `about` of each lane. A later version may append fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) version: u16,
    pub(crate) migration: MigrationId,
    pub(crate) generation: Generation,
}

impl About {
    pub(crate) fn bytes(self) -> Result<Bytes, RelayError> {
        encode("migration", &self).map_err(|_| RelayError::Protocol("no name for the migration"))
    }

    /// The version that both relays use, where `bytes` of the other one belong to what this one
    /// serves.
    pub(crate) fn agree(self, bytes: &[u8]) -> Result<u16, RelayError> {
        let theirs: Self = decode_open("migration", bytes)
            .map_err(|_| RelayError::Protocol("a lane that says not what it is about"))?;
        if theirs.migration != self.migration {
            return Err(RelayError::Protocol("it speaks of another migration"));
        }
        if theirs.generation != self.generation {
            return Err(RelayError::Protocol("it speaks of another generation"));
        }
        if theirs.version < OLDEST {
            return Err(RelayError::TooOld { theirs: theirs.version, oldest: OLDEST });
        }
        Ok(theirs.version.min(self.version))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Note {
    /// The destination has reached its QEMU.
    Ready,
    /// QEMU has taken this many more frames of the main channel.
    Ack(u32),
    /// This many more frames of pushed blocks are in the middle layer.
    DiskAck(u32),
    /// The destination has everything; nothing is needed of the source any more.
    Done,
    /// The migration ends here.
    Abort {
        why: String,
        /// Whether PONG 3 had been seen where this comes from.
        committed: bool,
    },
    /// What time is it there? Times are since 1970.
    Clock {
        /// When this was asked, by the clock of who asks.
        sent: Duration,
    },
    /// The answer to `Clock`.
    ClockIs {
        /// As it was asked.
        sent: Duration,
        /// When the question arrived, by the clock of who answers.
        arrived: Duration,
        /// When the answer left, by the same clock.
        replied: Duration,
        /// Which clock that is.
        clock: ClockId,
    },
    /// The destination has memory of this content open, to which frames may refer; before `Ready`, from
    /// version 3 on.
    Holds(Hash),
    /// The destination has open what the machine left there, to which frames may refer; before `Ready`,
    /// from version 4 on.
    Visited {
        /// When that was.
        visit: Visit,
        /// Which pages it has of that, a bit each.
        pages: Vec<u8>,
    },
    /// The destination has its machine's memory at hand: it answers for zero pages, and puts pages of what
    /// it holds there by itself; before `Ready`, behind `Holds`.
    Fills,
    /// The latter is done for this many more frames of kind Fill.
    Filled(u32),
}

pub(crate) async fn send_note(lane: &mut LaneSender, note: Note) -> Result<(), RelayError> {
    let note = match note {
        Note::Abort { mut why, committed } => {
            let cut = (0..=MAX_WHY.min(why.len())).rev().find(|n| why.is_char_boundary(*n));
            why.truncate(cut.unwrap_or(0));
            Note::Abort { why, committed }
        }
        note => note,
    };
    let bytes =
        encode("relay note", &note).map_err(|_| RelayError::Protocol("a note has no form"))?;
    lane.send_bytes(bytes)
        .await
        .map_err(|source| RelayError::Lane { what: "steering the other relay", source })
}

pub(crate) async fn recv_note(lane: &mut LaneReceiver) -> Result<Option<Note>, RelayError> {
    let frame = lane
        .recv()
        .await
        .map_err(|source| RelayError::Lane { what: "hearing from the other relay", source })?;
    frame
        .map(|f| {
            decode("relay note", &f).map_err(|_| RelayError::Protocol("a note that has no meaning"))
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(version: u16) -> About {
        About { version, migration: MigrationId::new(), generation: Generation(7) }
    }

    #[test]
    fn the_lower_version_of_both_relays_is_used_and_what_else_differs_is_named() {
        let ours = about(NEWEST);
        let from = |version| About { version, ..ours }.bytes().expect("bytes");
        assert_eq!(ours.agree(&from(NEWEST)).expect("the same"), NEWEST);
        assert_eq!(ours.agree(&from(u16::MAX)).expect("newer"), NEWEST);
        let longer = [&from(NEWEST + 1)[..], b"a field of a later version"].concat();
        assert_eq!(ours.agree(&longer).expect("newer"), NEWEST);
        let newer = About { version: NEWEST + 1, ..ours };
        assert_eq!(newer.agree(&from(NEWEST)).expect("older"), NEWEST);

        let refused = |bytes: &[u8]| ours.agree(bytes).expect_err("refused").to_string();
        let words = refused(&from(1));
        assert!(words.contains("version 1") && words.contains("2 is the oldest"), "{words}");
        let other = About { migration: MigrationId::new(), ..ours }.bytes().expect("bytes");
        assert!(refused(&other).contains("another migration"));
        let next = About { generation: Generation(8), ..ours }.bytes().expect("bytes");
        assert!(refused(&next).contains("another generation"));
        assert!(refused(b"").contains("not what it is about"));
        assert!(refused(&[0xff; 64]).contains("not what it is about"));
    }

    #[test]
    fn what_relays_of_the_release_before_say_is_read_and_written_as_it_was() {
        use godwit_transfer::LaneKind;
        use godwit_transfer::wire::{Hello, LaneHeader, Versions};

        let (mut lanes, mut notes) = (Vec::new(), std::collections::BTreeSet::new());
        let mut theirs = None;
        let lines = include_str!("recorded/relay-2.txt").lines();
        for line in lines.filter(|l| !l.starts_with('#')) {
            let (kind, hex) = line.rsplit_once(' ').expect("a kind and its bytes");
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
            let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
            match kind.split_once(' ') {
                Some(("note", what)) => {
                    let note: Note = decode("note", &bytes).expect(kind);
                    assert!(format!("{note:?}").starts_with(what), "{note:?}");
                    assert_eq!(encode("note", &note).expect("bytes"), bytes, "{kind}");
                    notes.insert(what.to_owned());
                }
                None if kind == "about" => theirs = Some(bytes),
                None if kind == "lane" => lanes.push(LaneHeader::decode(&bytes).expect("lane")),
                None if kind == "hello" => {
                    let hello: Hello = decode("greeting", &bytes).expect("hello");
                    let link = Versions::OURS.agree(hello.versions).expect("a version");
                    assert_eq!(known_by_peer(link), 2);
                }
                None if kind == "greeting" => {}
                _ => panic!("a recorded {kind}"),
            }
        }
        assert_eq!(notes.len(), 6, "{notes:?}");
        let theirs = theirs.expect("about");
        let about: About = decode("about", &theirs).expect("about");
        // It takes no other bytes than its own from a source, and those are what it gets.
        let source = About { version: known_by_peer(1), ..about };
        assert_eq!(source.bytes().expect("bytes"), theirs);
        let destination = About { version: NEWEST, ..about };
        assert_eq!(destination.agree(&theirs).expect("the same migration"), 2);
        let kinds: Vec<_> = lanes.iter().map(|l| l.kind).collect();
        assert_eq!(kinds.len(), 5);
        assert!(kinds.contains(&LaneKind::Steering) && kinds.contains(&LaneKind::DiskBulk));
        assert!(lanes.iter().all(|l| l.about == theirs));
    }

    #[test]
    fn notes_of_a_visit_are_understood() {
        let visit = Visit { vm: godwit_types::VmId::new(), generation: Generation(7) };
        let said = Note::Visited { visit, pages: vec![0xff; 512 << 10] };
        let bytes = encode("note", &said).expect("bytes");
        assert!(bytes.len() <= godwit_transfer::wire::MAX_FRAME);
        let note: Note = decode("note", &bytes).expect("understood");
        assert_eq!(note, said);
    }

    #[test]
    fn to_a_relay_of_before_only_its_own_version_is_named() {
        assert_eq!(known_by_peer(1), 2);
        assert_eq!(known_by_peer(4), REFERS);
        assert_eq!(known_by_peer(godwit_transfer::wire::Versions::OURS.max), NEWEST);
    }
}
