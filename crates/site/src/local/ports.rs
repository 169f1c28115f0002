//! The ports of this host that lead to machines.
//!
//! ```text
//!   the machine's record: published -------> held: nobody else on the host takes the port
//!   ... and it runs here -----------------> open: the `net` room leads it to the machine
//! ```
//!
//! A port is held by a socket that nobody speaks to: the kernel refuses it to other programs, which
//! would else be cut off from their callers without a word, and gives it to no relay. What is open is
//! in the kernel and outlives the daemon; what is held, the next one takes again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use godwit_net::{Attachment, HostPort, MOST_PORTS, NetworkKind, PublishedPort, Transport};
use godwit_types::{Code, Fault, Generation, Name, VmId};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use tokio::sync::{Notify, watch};

use super::LocalSite;
use super::allowed::{Action, First};
use super::course::End;
use super::entry::Entry;
use super::owner::{Ask, Needs, Owned};
use super::record::{DesiredState, MachineRecord};

/// The ports of one site.
pub(super) struct Ports {
    site: Name,
    /// Those that machines may have.
    range: RangeInclusive<u16>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    sockets: BTreeMap<HostPort, OwnedFd>,
    /// Those that another program has.
    lost: BTreeSet<HostPort>,
}

impl Ports {
    /// None yet, of those in `range`.
    pub(super) fn new(site: Name, range: RangeInclusive<u16>) -> Self {
        Self { site, range, held: Mutex::default() }
    }

    /// Refuses ports that a machine with this place cannot have here, and holds the others.
    ///
    /// # Errors
    /// Conflict for a port that this site does not give, or that is in use here; invalid for too many.
    pub(super) fn take(
        &self,
        attachment: Option<&Attachment>,
        published: &[PublishedPort],
    ) -> Result<(), Fault> {
        if published.is_empty() {
            return Ok(());
        }
        if attachment.is_none_or(|a| a.network.kind != NetworkKind::Nat) {
            return Err(Fault::conflict("only machines in a network of kind nat publish ports")
                .hint("see the networks with: godwit network list"));
        }
        let distinct: BTreeSet<HostPort> = published.iter().map(PublishedPort::at).collect();
        if published.len() > MOST_PORTS || distinct.len() < published.len() {
            return Err(Fault::invalid(format!(
                "a machine publishes {MOST_PORTS} ports at most, each once"
            )));
        }
        for port in &distinct {
            if !self.range.contains(&port.number.get()) {
                let (site, first, last) = (&self.site, self.range.start(), self.range.end());
                return Err(Fault::conflict(format!(
                    "port {port} is none that site '{site}' publishes: it has {first} to {last}"
                ))
                .hint("choose another one, or start the site with: --publish-ports FIRST-LAST"));
            }
        }
        distinct.into_iter().try_for_each(|port| self.hold(port))
    }

    /// Has nobody else on this host take a port.
    ///
    /// # Errors
    /// Conflict when somebody has.
    pub(super) fn hold(&self, port: HostPort) -> Result<(), Fault> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.sockets.contains_key(&port) {
            return Ok(());
        }
        let socket = reserve(port).map_err(|e| {
            let site = &self.site;
            let message = match e {
                rustix::io::Errno::ADDRINUSE => {
                    format!("port {port} of site '{site}' is in use there by another program")
                }
                e => format!("port {port} of site '{site}' cannot be had: {e}"),
            };
            Fault::new(Code::Conflict, message)
                .hint("publish another port, or end what has this one")
        })?;
        held.lost.remove(&port);
        held.sockets.insert(port, socket);
        Ok(())
    }

    /// Has those of `records` be held, and no others.
    pub(super) fn follow<'a>(&self, records: impl Iterator<Item = &'a MachineRecord>) {
        let wanted: BTreeSet<HostPort> =
            records.flat_map(|r| &r.published).map(PublishedPort::at).collect();
        for port in &wanted {
            if let Err(error) = self.hold(*port) {
                let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                if held.lost.insert(*port) {
                    tracing::warn!(%port, %error, "a published port is not held");
                }
            }
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.sockets.retain(|port, _| wanted.contains(port));
        held.lost.retain(|port| wanted.contains(port));
    }
}

/// A socket bound to a port, to which nobody speaks.
fn reserve(port: HostPort) -> rustix::io::Result<OwnedFd> {
    let kind = match port.protocol {
        Transport::Tcp => SocketType::STREAM,
        Transport::Udp => SocketType::DGRAM,
    };
    let at = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port.number.get());
    let bound = |reuse: bool| {
        let socket = socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, reuse)?;
        // Another site of this host may hold it for the same machine, which moves there.
        sockopt::set_socket_reuseport(&socket, true)?;
        bind(&socket, &at).map(|()| socket)
    };
    match (bound(false), port.protocol) {
        // What is left of connections of a program that has ended is in nobody's way.
        (Err(rustix::io::Errno::ADDRINUSE), Transport::Tcp) => bound(true),
        (done, _) => done,
    }
}

/// The ports that lead to a machine, as it is now: those of one that runs here.
pub(super) fn open(e: &Entry) -> &[PublishedPort] {
    let here = match &e.record.migration {
        Some(m) => m.has_run() == (m.end() == End::Destination),
        None => true,
    };
    let runs = e.machine.is_some() && e.record.desired == DesiredState::Running;
    if here && runs { &e.record.published } else { &[] }
}

/// Tells `changed` whenever other ports lead to a machine.
pub(super) fn watch(mut machine: watch::Receiver<Entry>, changed: Arc<Notify>) {
    tokio::spawn(async move {
        let mut before = Vec::new();
        loop {
            let now = open(&machine.borrow_and_update()).to_vec();
            if now != before {
                changed.notify_one();
                before = now;
            }
            if machine.changed().await.is_err() {
                break;
            }
        }
        if !before.is_empty() {
            changed.notify_one();
        }
    });
}

impl LocalSite {
    /// Has a machine publish these ports, and no others.
    pub(super) async fn publish(
        &self,
        vm: VmId,
        generation: Generation,
        published: Vec<PublishedPort>,
    ) -> Result<(), Fault> {
        let parts = &self.parts;
        let owner = parts.machines.owner(vm).await?;
        parts.networks.ports.take(owner.now().record.attachment.as_ref(), &published)?;
        let before = owner.now();
        owner.ask(Publish { generation, published }).await?;
        let now = owner.now();
        match &now.record.attachment {
            // What does not run here is opened when it does.
            Some(attachment) if open(&now) != open(&before) => {
                parts.networks.publishes(&parts.machines, attachment).await
            }
            _ => Ok(()),
        }
    }
}

/// A machine is to publish these ports.
struct Publish {
    generation: Generation,
    published: Vec<PublishedPort>,
}

impl Ask for Publish {
    type Reply = ();
    const STEP: &'static str = "owner.publish";

    fn needs(&self) -> Option<Needs> {
        Some(Needs::known(Action::Publish, self.generation))
    }

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if e.record.published == self.published {
            return Ok(());
        }
        let before = std::mem::replace(&mut e.record.published, self.published);
        e.save().inspect_err(|_| e.record.published = before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_net::{MacAddress, Network, Prefix};
    use godwit_types::NetworkId;

    fn name(name: &str) -> Name {
        Name::new(name).expect("name")
    }

    fn place(kind: NetworkKind) -> Attachment {
        let prefix = Prefix::DEFAULT;
        let network = Network { id: NetworkId::new(), name: name("n"), kind, prefix };
        let address = prefix.hosts().next().expect("one");
        Attachment { network, mac: MacAddress([2, 0, 0, 0, 0, 1]), address }
    }

    fn port(text: &str) -> PublishedPort {
        text.parse().expect("port")
    }

    #[test]
    fn a_port_is_held_for_its_machine_and_free_again_after_it() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let number = other.local_addr().expect("bound").port();
        let ports = Ports::new(name("here"), 1024..=65535);
        let nat = place(NetworkKind::Nat);
        let wanted = [port(&format!("{number}:80/tcp"))];
        let used = ports.take(Some(&nat), &wanted).expect_err("another program has it");
        assert_eq!(used.code, Code::Conflict);
        assert!(used.message.contains("in use there by another program"), "{used}");
        drop(other);
        ports.take(Some(&nat), &wanted).expect("it is free");
        for taken in ["0.0.0.0", "127.0.0.1"] {
            let tried = std::net::TcpListener::bind((taken, number));
            assert!(tried.is_err(), "{taken}: nobody else has it meanwhile");
        }
        ports.follow(std::iter::empty());
        std::net::TcpListener::bind(("127.0.0.1", number)).expect("nobody publishes it any more");
    }

    #[test]
    fn ports_that_a_site_does_not_give_are_refused() {
        let ports = Ports::new(name("here"), 20000..=20099);
        let nat = place(NetworkKind::Nat);
        let refused = |place: Option<&Attachment>, wanted: &[PublishedPort]| {
            ports.take(place, wanted).expect_err("refused").message
        };
        let outside = refused(Some(&nat), &[port("8080:80/tcp")]);
        assert!(outside.contains("it has 20000 to 20099"), "{outside}");
        let good = port("20001:80/udp");
        for place in [None, Some(&place(NetworkKind::Private))] {
            assert!(refused(place, &[good]).contains("kind nat"));
        }
        assert!(refused(Some(&nat), &[good, port("20001:81/udp")]).contains("each once"));
        let many: Vec<_> = (20000..20000 + 65).map(|n| port(&format!("{n}:80/udp"))).collect();
        assert!(refused(Some(&nat), &many).contains("64 ports at most"));
        ports.take(None, &[]).expect("none are everybody's");
    }
}
