//! What a site that joined may tell: a site can be stolen, and what it says is kept in memory,
//! written down and shown.
//!
//! Texts for people are cut and stripped of control characters; what exceeds a bound otherwise is
//! refused with the field's name, and the link goes on.

use godwit_types::{Code, Fault, UnixMs};

use super::{Fell, ImageInfo, MachineStatus, SiteReply, SubstrateInfo, TookBack};
use crate::SiteReport;

/// Machines in one answer.
const MAX_MACHINES: usize = 200_000;

/// Substrates in one answer.
const MAX_SUBSTRATES: usize = 20_000;

/// Images in one answer.
const MAX_IMAGES: usize = 1_000;

/// Damaged substrates that a report names.
const MAX_DAMAGED_SUBSTRATES: usize = 1_000;

/// Damaged things named by one check.
const MAX_DAMAGED: usize = 10_000;

/// Bytes of a version or the name of an accelerator.
const MAX_WORD: usize = 64;

/// Bytes of a text for people.
const MAX_TEXT: usize = 4096;

/// The largest size that is believed, in bytes: sums of many still fit.
const MAX_BYTES: u64 = 1 << 50;

/// The most memory or disk of one host that is believed, in MiB: an exbibyte.
const MAX_MIB: u64 = 1 << 40;

fn refuse(what: &str) -> Fault {
    Fault::new(Code::Damaged, format!("an answer that cannot be used: {what}"))
}

fn at_most(what: &str, n: usize, limit: usize) -> Result<(), Fault> {
    if n <= limit { Ok(()) } else { Err(refuse(&format!("{n} {what}, over {limit}"))) }
}

fn word(what: &str, text: &str) -> Result<(), Fault> {
    if text.len() <= MAX_WORD && text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return Ok(());
    }
    Err(refuse(&format!("{what} is longer than {MAX_WORD} bytes or not plain text")))
}

fn size(what: &str, n: u64, limit: u64) -> Result<(), Fault> {
    if n <= limit { Ok(()) } else { Err(refuse(&format!("{what} is {n}"))) }
}

/// Cuts a text for people to `limit` bytes and replaces what is not to be printed.
pub fn tidy(text: &mut String, limit: usize) {
    if text.len() > limit {
        let end = (0..=limit.saturating_sub(3)).rev().find(|n| text.is_char_boundary(*n));
        text.truncate(end.unwrap_or(0));
        text.push_str("...");
    }
    if text.contains(|c: char| c.is_control() && c != '\n') {
        *text = text.replace(|c: char| c.is_control() && c != '\n', " ");
    }
}

/// A failure as a site tells it.
pub fn fault(mut f: Fault) -> Fault {
    tidy(&mut f.message, MAX_TEXT);
    if let Some(hint) = &mut f.hint {
        tidy(hint, MAX_TEXT);
    }
    f
}

/// An answer within its bounds.
pub(super) fn checked(mut reply: SiteReply) -> Result<SiteReply, Fault> {
    match &mut reply {
        SiteReply::Report(r) => {
            report(r)?;
            r.damaged.values_mut().for_each(|why| tidy(why, MAX_TEXT));
        }
        SiteReply::Images(all) => {
            at_most("images", all.len(), MAX_IMAGES)?;
            all.iter_mut().try_for_each(image)?;
        }
        SiteReply::Image(i) => image(i)?,
        SiteReply::Machines(all) => {
            at_most("machines", all.len(), MAX_MACHINES)?;
            all.iter_mut().for_each(machine);
        }
        SiteReply::Machine(m) => machine(m),
        SiteReply::Substrates(all) => {
            at_most("substrates", all.len(), MAX_SUBSTRATES)?;
            all.iter_mut().try_for_each(substrate)?;
        }
        SiteReply::Address(Some(a))
            if a.port() == 0 || a.ip().is_unspecified() || a.ip().is_multicast() =>
        {
            return Err(Fault::new(Code::Damaged, format!("nobody listens at {a}")));
        }
        SiteReply::Substrate(s) => substrate(s)?,
        SiteReply::Pool(p) => {
            for n in [p.raw_bytes, p.stored_bytes, p.memory_bytes, p.free_bytes] {
                size("a size of its pool", n, MAX_BYTES)?;
            }
        }
        SiteReply::Checked(c) => {
            at_most("damaged units", c.damaged.len(), MAX_DAMAGED)?;
            c.damaged.iter_mut().for_each(|d| tidy(d, MAX_TEXT));
        }
        SiteReply::Visits(all) => at_most("visits", all.len(), MAX_MACHINES)?,
        SiteReply::Fell(Fell { why, .. }) | SiteReply::TookBack(TookBack::Never { why }) => {
            tidy(why, MAX_TEXT);
        }
        SiteReply::Bytes(n) => size("the size of a disk", *n, MAX_BYTES)?,
        // Bounded by the longest message, and not kept.
        _ => {}
    }
    Ok(reply)
}

fn report(r: &SiteReport) -> Result<(), Fault> {
    word("its version", &r.version)?;
    word("its accelerator", &r.accel)?;
    word("its QEMU's version", &r.qemu)?;
    at_most("substrates", r.substrates.len(), MAX_SUBSTRATES)?;
    at_most("damaged substrates", r.damaged.len(), MAX_DAMAGED_SUBSTRATES)?;
    at_most("images", r.images.len(), MAX_IMAGES)?;
    at_most("machines", r.vms as usize, MAX_MACHINES)?;
    for (what, mib) in [
        ("its memory", r.memory_mib),
        ("its free memory", r.memory_free_mib),
        ("its room for RAM files", r.ram_files_free_mib),
        ("its room on disk", r.disk_free_mib),
        ("its promised memory", r.memory_promised_mib),
        ("the memory that it may promise", r.memory_promise_mib),
    ] {
        size(what, mib, MAX_MIB)?;
    }
    if r.load.is_finite() && r.load >= 0.0 { Ok(()) } else { Err(refuse("its load")) }
}

fn image(i: &mut ImageInfo) -> Result<(), Fault> {
    size("the size of an image", i.bytes, MAX_BYTES)?;
    for text in [&mut i.app, &mut i.fault].into_iter().flatten() {
        tidy(text, MAX_TEXT);
    }
    Ok(())
}

fn machine(m: &mut MachineStatus) {
    if let Some(reason) = &mut m.reason {
        tidy(reason, MAX_TEXT);
    }
}

/// What a site says of a substrate, within its bounds.
pub fn substrate(s: &mut SubstrateInfo) -> Result<(), Fault> {
    size("the size of a substrate", s.raw_bytes, MAX_BYTES)?;
    size("the stored size of a substrate", s.stored_bytes, MAX_BYTES)?;
    // One from the future would be new for as long as it likes.
    s.created = s.created.min(UnixMs::now());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_types::SubstrateId;

    fn refused(r: SiteReport, words: &str) {
        let e = checked(SiteReply::Report(r)).expect_err(words);
        assert_eq!(e.code, Code::Damaged);
        assert!(e.message.contains(words), "{e}");
    }

    #[test]
    fn a_report_is_bounded_in_each_field() {
        let good = SiteReport { load: 0.5, qemu: "10.0.2".into(), ..SiteReport::default() };
        checked(SiteReply::Report(good.clone())).expect("good");
        refused(SiteReport { qemu: "x".repeat(65), ..good.clone() }, "its QEMU's version");
        refused(SiteReport { version: "1\u{1b}[2J".into(), ..good.clone() }, "its version");
        refused(SiteReport { load: f64::NAN, ..good.clone() }, "its load");
        refused(SiteReport { memory_free_mib: u64::MAX, ..good.clone() }, "its free memory");
        let many = (0..=MAX_SUBSTRATES).map(|_| SubstrateId::new()).collect();
        refused(SiteReport { substrates: many, ..good }, "substrates, over 20000");
    }

    #[test]
    fn texts_are_cut_between_characters_and_cannot_steer_a_terminal() {
        let mut text = format!("{}\u{1b}[31m\nrest", "\u{fc}".repeat(MAX_TEXT));
        tidy(&mut text, MAX_TEXT);
        assert!(text.len() <= MAX_TEXT && text.ends_with("\u{fc}..."), "{}", text.len());
        let mut text = "a\u{7}b\nc\u{9b}d".to_owned();
        tidy(&mut text, 100);
        assert_eq!(text, "a b\nc d");
        let f = fault(Fault::internal("x".repeat(1 << 20)).hint("y".repeat(1 << 20)));
        assert!(f.message.len() <= MAX_TEXT && f.hint.expect("kept").len() <= MAX_TEXT);
    }
}
