//! A substrate on its way from one site's pool to another's, by the units that the other lacks.
//!
//! ```text
//!  taker                                                 supplier
//!    | <---- head of the archive form, up to its units ---- |
//!    | Lacking{units, of} --> whoever is in between          |
//!    | Want[hash..] ---------------------------------------> |   a few are under way at a time
//!    | <----------------------- those units, in that order - |
//!    | Enough ----------------------------------------------> |
//! ```
//! The taker decides: it asks its own store which units it lacks. Units travel as they are stored.
//! A supplier gives nothing that is not of the substrate, and nothing twice. When the stream breaks
//! off, or the taker's daemon dies, what has come is kept for [`KEPT`] (`coming`); the next try asks
//! for the rest only.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use godwit_store::{Effort, Encoder, UNIT};
use godwit_types::{Hash, SubstrateId};

use crate::archive::{Import, ImportAs, UnitHead, read_head, take_unit, write_head, write_unit};
use crate::error::SubstrateError;
use crate::manifest::Substrate;
use crate::pool::Pool;

/// The most units that one message asks for.
pub const MAX_WANT: usize = 512;

/// Messages that ask for units and are not answered yet: 8 MiB of pages.
const UNDER_WAY: usize = 4;

/// How long what came before a break is kept for the next try.
pub const KEPT: Duration = Duration::from_secs(600);

/// What a taker tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakerMsg {
    /// It begins: how many units it lacks.
    Lacking {
        /// Distinct units that it has not.
        units: u64,
        /// Distinct units of the substrate.
        of: u64,
    },
    /// It asks for these, 1 to [`MAX_WANT`].
    Want(Vec<Hash>),
    /// It asks for no more. What follows is for whoever opened the exchange.
    Enough,
}

impl TakerMsg {
    const LACKING: u8 = 1;
    const WANT: u8 = 2;
    const ENOUGH: u8 = 3;

    /// Bytes that follow a message's first one, as far as that tells; `None` for no known message.
    #[must_use]
    pub const fn fixed(tag: u8) -> Option<usize> {
        match tag {
            Self::LACKING => Some(16),
            Self::WANT => Some(2),
            Self::ENOUGH => Some(0),
            _ => None,
        }
    }

    /// Bytes of hashes that follow the fixed part of a [`TakerMsg::Want`].
    ///
    /// # Errors
    /// [`SubstrateError::Damaged`] for none or more than [`MAX_WANT`].
    pub fn hashes(tag: u8, fixed: &[u8]) -> Result<usize, SubstrateError> {
        if tag != Self::WANT {
            return Ok(0);
        }
        let n = fixed.try_into().map_or(0, u16::from_le_bytes);
        match usize::from(n) {
            n @ 1..=MAX_WANT => Ok(n * 32),
            n => Err(bad(&format!("{n} units are asked for at once"))),
        }
    }

    /// Puts a message together from its parts.
    ///
    /// # Errors
    /// [`SubstrateError::Damaged`] when they do not fit.
    pub fn decode(tag: u8, fixed: &[u8], hashes: &[u8]) -> Result<Self, SubstrateError> {
        let number = |at: usize| {
            let bytes = fixed.get(at..at + 8).and_then(|b| b.try_into().ok());
            bytes.map(u64::from_le_bytes).ok_or_else(|| bad("a message is cut short"))
        };
        match tag {
            Self::LACKING => Ok(Self::Lacking { units: number(0)?, of: number(8)? }),
            Self::WANT => {
                let (hashes, rest) = hashes.as_chunks::<32>();
                if hashes.is_empty() || !rest.is_empty() {
                    return Err(bad("a message is cut short"));
                }
                Ok(Self::Want(hashes.iter().map(|h| Hash(*h)).collect()))
            }
            Self::ENOUGH => Ok(Self::Enough),
            _ => Err(bad("a message is not known")),
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Lacking { units, of } => {
                [&[Self::LACKING][..], &units.to_le_bytes(), &of.to_le_bytes()].concat()
            }
            Self::Want(hashes) => {
                let mut out = vec![Self::WANT];
                out.extend_from_slice(&(hashes.len() as u16).to_le_bytes());
                hashes.iter().for_each(|h| out.extend_from_slice(&h.0));
                out
            }
            Self::Enough => vec![Self::ENOUGH],
        }
    }

    fn read(from: &mut impl Read) -> Result<Self, SubstrateError> {
        let mut tag = [0];
        from.read_exact(&mut tag).map_err(SubstrateError::BrokeOff)?;
        let len = Self::fixed(tag[0]).ok_or_else(|| bad("a message is not known"))?;
        let mut fixed = vec![0; len];
        from.read_exact(&mut fixed).map_err(SubstrateError::BrokeOff)?;
        let mut hashes = vec![0; Self::hashes(tag[0], &fixed)?];
        from.read_exact(&mut hashes).map_err(SubstrateError::BrokeOff)?;
        Self::decode(tag[0], &fixed, &hashes)
    }
}

fn bad(why: &str) -> SubstrateError {
    SubstrateError::damaged("the exchange of a substrate", why)
}

impl Pool {
    /// Gives substrate `id` to a taker: its small parts, then the units that `wants` asks for. Its
    /// verdict is not read here.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`]; what is damaged; [`SubstrateError::BrokeOff`]; a taker that
    /// asks for what is not of the substrate.
    pub fn supply(
        &self,
        id: SubstrateId,
        wants: impl Read,
        out: impl Write,
    ) -> Result<(), SubstrateError> {
        let name = self.docked(id)?.substrate.name;
        let done = self.supply_units(id, wants, out).map_err(|e| match e {
            e @ SubstrateError::BrokeOff(_) => e,
            e => e.of(&name),
        });
        self.note_use(id, done.as_ref().err());
        done
    }

    fn supply_units(
        &self,
        id: SubstrateId,
        mut wants: impl Read,
        mut out: impl Write,
    ) -> Result<(), SubstrateError> {
        let bundle = self.bundle(id)?;
        let mut own: HashSet<Hash> = self.units(id)?.into_iter().collect();
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(SubstrateError::BrokeOff);
        write_head(&bundle, &mut put)?;
        out.flush().map_err(SubstrateError::BrokeOff)?;
        let mut encoder = Encoder::new(Effort::Small);
        loop {
            match TakerMsg::read(&mut wants)? {
                TakerMsg::Want(hashes) => {
                    let mut put =
                        |bytes: &[u8]| out.write_all(bytes).map_err(SubstrateError::BrokeOff);
                    for hash in hashes {
                        if !own.remove(&hash) {
                            let why = "the taker asks for a unit that is not of it, or that it got";
                            return Err(bad(why));
                        }
                        write_unit(self.store(), &mut encoder, hash, &mut put)?;
                    }
                    out.flush().map_err(SubstrateError::BrokeOff)?;
                }
                TakerMsg::Enough => return Ok(()),
                // For whoever shows how far it is.
                TakerMsg::Lacking { .. } => {}
            }
        }
    }

    /// Takes a substrate in from a supplier, asking for the units that this pool lacks. `control`
    /// carries [`TakerMsg`]s; [`TakerMsg::Enough`] is left to the caller, who has more to say.
    ///
    /// # Errors
    /// As [`Import`]; [`SubstrateError::BrokeOff`] when the stream ends early: what has come is
    /// kept for the next try. A caller that gives the whole thing up lets `from` fail with
    /// [`ErrorKind::ConnectionAborted`]; then nothing is kept.
    pub fn take(
        &self,
        becomes: ImportAs,
        mut from: impl Read,
        mut control: impl Write,
    ) -> Result<Substrate, SubstrateError> {
        let bundle = read_head(&mut |out: &mut [u8]| {
            from.read_exact(out).map_err(SubstrateError::BrokeOff)
        })?;
        let mut import = Import::begin_kept(self, bundle, becomes)?;
        match take_units(&mut import, &mut from, &mut control) {
            Ok(()) => import.finish(),
            Err(SubstrateError::BrokeOff(e)) if e.kind() != ErrorKind::ConnectionAborted => {
                import.keep();
                Err(SubstrateError::BrokeOff(e))
            }
            Err(e) => {
                import.give_up();
                Err(e)
            }
        }
    }
}

fn take_units(
    import: &mut Import,
    from: &mut impl Read,
    control: &mut impl Write,
) -> Result<(), SubstrateError> {
    let mut send = |message: &TakerMsg| {
        control
            .write_all(&message.encode())
            .and_then(|()| control.flush())
            .map_err(SubstrateError::BrokeOff)
    };
    let lacking = import.lacking();
    send(&TakerMsg::Lacking { units: lacking.len() as u64, of: import.units() })?;
    let mut wants = lacking.chunks(MAX_WANT);
    let mut asked = 0;
    for batch in wants.by_ref().take(UNDER_WAY) {
        send(&TakerMsg::Want(batch.to_vec()))?;
        asked += batch.len();
    }
    let mut body = [0; UNIT];
    let mut come = 0;
    let mut wanted = lacking.iter();
    while come < asked {
        let UnitHead { hash, encoding, raw_len, len } = take_unit(
            &mut |out: &mut [u8]| from.read_exact(out).map_err(SubstrateError::BrokeOff),
            &mut body,
        )?;
        if wanted.next() != Some(&hash) {
            return Err(bad("a unit comes that was not asked for, or not in its turn"));
        }
        import.put(hash, encoding, raw_len, &body[..len])?;
        come += 1;
        if come % MAX_WANT == 0
            && let Some(batch) = wants.next()
        {
            send(&TakerMsg::Want(batch.to_vec()))?;
            asked += batch.len();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_were_sent() {
        let all = [
            TakerMsg::Lacking { units: 7, of: 1 << 40 },
            TakerMsg::Want(vec![Hash::of(b"a"), Hash::of(b"b")]),
            TakerMsg::Want(vec![Hash::of(b"c"); MAX_WANT]),
            TakerMsg::Enough,
        ];
        let bytes: Vec<u8> = all.iter().flat_map(TakerMsg::encode).collect();
        let mut from = &bytes[..];
        for message in &all {
            assert_eq!(TakerMsg::read(&mut from).unwrap(), *message);
        }
        assert!(matches!(TakerMsg::read(&mut from), Err(SubstrateError::BrokeOff(_))));
        for nonsense in [&[9u8][..], &[2, 0, 0], &[2, 1, 2, 0, 0], &[2, 255, 255]] {
            let e = TakerMsg::read(&mut &nonsense[..]).unwrap_err();
            assert!(matches!(e, SubstrateError::Damaged { .. }), "{nonsense:?}: {e}");
        }
    }
}
