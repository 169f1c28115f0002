//! Guests that have rebooted themselves are told their place in a network again: it is set in the
//! running guest, which forgets it with each boot.
//!
//! QEMU reports a reset by its guest. What it reported while no daemon listened, or at the site that a
//! machine came from, nobody has heard: of one that is adopted or arrives the guest is asked whether it
//! still has its address.

use std::time::{Duration, Instant};

use godwit_qemu::{Event, EventCursor, Machine};
use godwit_substrate::has_address;
use tokio::sync::watch;

use super::allowed::Activity;
use super::entry::Entry;
use super::machines::LOOK_EVERY;
use super::net::tell_guest;
use super::starts::BOOT_WITHIN;

/// How long a guest may take to say which addresses it has.
const ASK_WITHIN: Duration = Duration::from_secs(30);

/// Looks after the guest of one machine until its owner is gone.
pub(super) async fn follow(published: watch::Receiver<Entry>) {
    let mut gone = published.clone();
    tokio::select! {
        _ = gone.wait_for(|_| false) => {}
        () = listen(published) => {}
    }
}

async fn listen(mut published: watch::Receiver<Entry>) {
    loop {
        let is_in_one = |e: &Entry| e.machine.is_some() && e.record.attachment.is_some();
        let Ok(entry) = published.wait_for(is_in_one).await.map(|e| e.clone()) else { return };
        let Some(machine) = entry.machine else { continue };
        let process = machine.process().clone();
        let mut resets = machine.events();
        drop(machine);
        let is_it = |e: &Entry| e.machine.as_ref().is_some_and(|m| *m.process() == process);
        // Whoever starts it tells its guest.
        if entry.doing.activity() != Activity::Starting {
            tell_again(&mut published, &is_it, Why::Unheard).await;
        }
        while next_reset(&mut resets).await {
            tell_again(&mut published, &is_it, Why::Reset).await;
        }
        if published.wait_for(|e| !is_it(e)).await.is_err() {
            return;
        }
    }
}

/// Why a guest may not know its network any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// It has rebooted.
    Reset,
    /// It may have, when nobody listened.
    Unheard,
}

/// Waits until the guest resets its machine; not, once QEMU is gone.
async fn next_reset(events: &mut EventCursor) -> bool {
    while let Some(event) = events.next().await {
        if is_by_guest(&event) {
            return true;
        }
    }
    false
}

/// Whether QEMU reports that the guest has reset its machine.
fn is_by_guest(event: &Event) -> bool {
    event.name == "RESET" && event.data["guest"] == true
}

/// Tells the guest once it answers, and nothing else is done with its machine.
async fn tell_again(
    published: &mut watch::Receiver<Entry>,
    is_it: &impl Fn(&Entry) -> bool,
    why: Why,
) {
    let begun = Instant::now();
    loop {
        let is_free =
            |e: &Entry| e.doing.activity() == Activity::Nothing && e.record.migration.is_none();
        let free = published.wait_for(|e| !is_it(e) || is_free(e)).await.map(|e| e.clone());
        let Some(Entry { record, machine: Some(machine), .. }) = free.ok().filter(is_it) else {
            return;
        };
        if let Err(error) = machine.agent().ping(LOOK_EVERY * 8).await {
            if begun.elapsed() > BOOT_WITHIN {
                // One without an agent asks by DHCP.
                tracing::debug!(vm = %record.name, %error, "its guest is not told its network");
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        }
        let Some(attachment) = &record.attachment else { return };
        if why == Why::Unheard && has_its(&machine, attachment.address).await {
            return;
        }
        match tell_guest(&machine, Some(attachment), Some(&record.name)).await {
            Ok(()) => tracing::info!(vm = %record.name, "its guest has rebooted: told its network"),
            Err(error) => {
                tracing::warn!(vm = %record.name, %error, "its guest has rebooted and was not told its network");
            }
        }
        return;
    }
}

/// Whether a guest has that address, as far as it says.
async fn has_its(machine: &Machine, address: std::net::Ipv4Addr) -> bool {
    let asked = tokio::time::timeout(ASK_WITHIN, has_address(machine, address)).await;
    // One that cannot say is let alone.
    asked.is_err() || asked.is_ok_and(|has| has.unwrap_or(true))
}
