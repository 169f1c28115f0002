//! Migration of execution environments between sites: the relays at both ends, the schemes that
//! drive them, and what they measure.
//!
//! # How it works
//!
//! Source QEMU sends into a relay on its host, the destination's QEMU is fed by a relay on its
//! host. The relays parse the stream, pack bulk, and let everything that is under way through
//! before the machine stops, so that its device state waits for nothing. Where both sites hold the
//! substrate that the machine comes from, its pages are named in place of sent, and of those that
//! changed little only the change is sent (`relay/known.rs`). The pages that hold the
//! machine's virtio queues are asked for right behind the device state, before the destination can:
//! its QEMU reads them while it loads the devices, and each would stop it for a round trip. After
//! the switch memory goes before disk: a vCPU waits for each page, while most of what a guest reads
//! from its disk is in its memory; demanded blocks are served all the time. A page that the
//! destination asks for brings the nearest missing pages along (fault-around): the relay knows from
//! the discards at the switch what is still to come, and QEMU sends what it is asked for. If the
//! destination is lost between STOP and PONG 3, the source asks the center for its fate: the center
//! kills what never ran there, and the source then takes QEMU's stream to its end and lets the
//! machine run on. This needs no copy of the RAM. After PONG 3 a relay, a link or a daemon that is
//! lost is replaced: new relays are started at both ends, QEMU's post-copy is recovered and the
//! disk goes on where it was. QEMU may switch only when its relay says so (`switchover-ack`): one
//! that ended pre-copy by itself while nobody read would hold its main lock for good. One that
//! finds nothing dirty at the switch sends its device state in the open; the relay makes
//! post-copy's form of it, so that there is one form with one commit point. A QEMU whose connection
//! is closed between STOP and the end of its device state comes back by no command, and one that
//! has sent everything and loses its connection would let its machine run a second time. So from
//! the switch to the end of a move the source's daemon holds the relay's end of the connection, too
//! (`pidfd_getfd`), reads on when the relay dies, and keeps the source's QEMU still. A relay closes
//! that connection when it ends, and never shuts it down: the daemon's hold would not survive that.
//! A destination's QEMU that dies beyond the commit point takes the memory along; its disk is then
//! brought alone, from the source's frozen layers, and the machine starts from it. What a killed
//! relay had read and not delivered is read from the memory of the source's QEMU, and sent as that
//! QEMU would (`hybrid/rest.rs`). Relays take their version from the link's greeting; migration and
//! generation must be equal. They compare their hosts' clocks, and the destination's times are read
//! by the source's.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod clock;
pub mod hybrid;
pub mod relay;

pub use relay::{RelayClient, RelayConfig, RelayError, run_relay};
