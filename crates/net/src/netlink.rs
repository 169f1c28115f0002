//! What is asked of the kernel itself, so that no program has to be started for a look: interfaces,
//! their addresses and the default route (rtnetlink), and the generation of the rules (nftables), which
//! counts every change of them. The answers are the kernel's; they are read with care all the same.

use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink,
};

/// How long the kernel may take to answer.
const WITHIN: Duration = Duration::from_secs(5);
/// How often a list is asked for that changed while it was given.
const TRIES: usize = 10;

/// That of interfaces and routes is number 0.
const ROUTE: Option<Protocol> = None;

// linux/netlink.h
const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const DUMP: u16 = 0x300;
const INTERRUPTED: u16 = 0x10;
// linux/rtnetlink.h, if_link.h, if_addr.h
const GET_LINK: u16 = 18;
const GET_ADDRESS: u16 = 22;
const GET_ROUTE: u16 = 26;
const NAME: u16 = 3;
const MASTER: u16 = 10;
const LOCAL: u16 = 2;
const GATEWAY: u16 = 5;
const MAIN_TABLE: u8 = 254;
const UNICAST: u8 = 1;
const UP: u32 = 1;
const INET: u8 = 2;
// linux/netfilter/nf_tables.h
const GET_GENERATION: u16 = 10 << 8 | 16;
const GENERATION_ID: u16 = 1;

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) is_up: bool,
    /// The bridge that it is a port of, by its index; 0 for none.
    pub(crate) master: u32,
    /// Its IPv4 addresses, with the bits of their prefix.
    pub(crate) addresses: Vec<(Ipv4Addr, u8)>,
}

/// The interfaces of this thread's network namespace.
pub(crate) fn interfaces() -> Result<BTreeMap<String, Interface>> {
    let socket = open(ROUTE)?;
    // A list that changes while it is given would not fit together.
    for _ in 0..TRIES {
        let mut all: BTreeMap<String, Interface> = BTreeMap::new();
        let is_whole =
            ask(&socket, (GET_LINK, DUMP), &[0; 16], |body| {
                let (index, flags) = (u32_at(body, 4)?, u32_at(body, 8)?);
                let of = attributes(body.get(16..)?);
                let name = text(of.get(&NAME)?)?;
                let master = of.get(&MASTER).and_then(|v| u32_at(v, 0)).unwrap_or(0);
                let is_up = flags & UP != 0;
                all.insert(name, Interface { index, is_up, master, addresses: Vec::new() });
                Some(())
            })? && ask(&socket, (GET_ADDRESS, DUMP), &[INET, 0, 0, 0, 0, 0, 0, 0], |body| {
                let (bits, index) = (*body.get(1)?, u32_at(body, 4)?);
                let of = attributes(body.get(8..)?);
                let address = address(of.get(&LOCAL)?)?;
                let interface = all.values_mut().find(|i| i.index == index)?;
                interface.addresses.push((address, bits));
                Some(())
            })?;
        if is_whole {
            return Ok(all);
        }
    }
    Err(Error::other("its interfaces change all the time"))
}

/// Where this thread's network namespace has its default route lead, if it has one.
pub(crate) fn default_gateway() -> Result<Option<Ipv4Addr>> {
    let socket = open(ROUTE)?;
    let mut gateway = None;
    let mut request = [0; 12];
    request[0] = INET;
    ask(&socket, (GET_ROUTE, DUMP), &request, |body| {
        let is_default =
            *body.get(1)? == 0 && *body.get(4)? == MAIN_TABLE && *body.get(7)? == UNICAST;
        if is_default && gateway.is_none() {
            gateway = address(attributes(body.get(12..)?).get(&GATEWAY)?);
        }
        Some(())
    })?;
    Ok(gateway)
}

/// The generation of the rules in this thread's network namespace: another after each change.
pub(crate) fn rules_generation() -> Result<u32> {
    let socket = open(Some(netlink::NETFILTER))?;
    let mut generation = None;
    ask(&socket, (GET_GENERATION, 0), &[0; 4], |body| {
        let of = attributes(body.get(4..)?);
        generation = of.get(&GENERATION_ID)?.get(..4)?.try_into().ok().map(u32::from_be_bytes);
        Some(())
    })?;
    generation.ok_or_else(|| Error::other("the kernel says no generation of its rules"))
}

fn open(protocol: Option<Protocol>) -> Result<OwnedFd> {
    let kind = (AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(kind.0, kind.1, kind.2, protocol)?;
    let timeout = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&socket, timeout, Some(WITHIN))?;
    Ok(socket)
}

/// Asks, and gives the body of each answer to `each`; whether the list did not change meanwhile.
fn ask(
    socket: &OwnedFd,
    (kind, flags): (u16, u16),
    body: &[u8],
    mut each: impl FnMut(&[u8]) -> Option<()>,
) -> Result<bool> {
    let length = u32::try_from(HEADER + body.len()).map_err(Error::other)?;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend((REQUEST | flags).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    rustix::net::send(socket, &request, SendFlags::empty())?;
    let (mut is_whole, mut buffer) = (true, vec![0; 64 << 10]);
    loop {
        let (read, _) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = buffer.get(..read).unwrap_or_default();
        while let (Some(length), Some(kind), Some(marks)) =
            (u32_at(rest, 0), u16_at(rest, 4), u16_at(rest, 6))
        {
            let length = usize::try_from(length).map_err(Error::other)?;
            let message = rest.get(HEADER..length).ok_or_else(|| Error::other("a torn answer"))?;
            is_whole &= marks & INTERRUPTED == 0;
            match kind {
                DONE => return Ok(is_whole),
                ERROR => {
                    let number = u32_at(message, 0).unwrap_or_default().cast_signed();
                    return Err(Error::from_raw_os_error(number.saturating_neg()));
                }
                // One that lacks what is looked for is not among what is looked for.
                _ => drop(each(message)),
            }
            if flags & DUMP == 0 {
                return Ok(is_whole);
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The attributes of an answer, by their type.
fn attributes(mut rest: &[u8]) -> BTreeMap<u16, &[u8]> {
    let mut all = BTreeMap::new();
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let Some(value) = rest.get(4..usize::from(length)) else { break };
        // Two bits say how it is encoded.
        all.insert(kind & 0x3fff, value);
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

fn text(value: &[u8]) -> Option<String> {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8(value.get(..end)?.to_vec()).ok()
}

fn address(value: &[u8]) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = value.try_into().ok()?;
    Some(bytes.into())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_loopback_is_there_with_its_address() {
        let all = interfaces().expect("asked");
        let lo = all.get("lo").expect("a loopback");
        assert!(lo.index > 0 && lo.master == 0, "{lo:?}");
        let has = lo.addresses.contains(&(Ipv4Addr::LOCALHOST, 8));
        assert!(has || !lo.is_up, "{lo:?}");
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = attributes(&bytes);
            let _ = (text(&bytes), address(&bytes), u32_at(&bytes, 0), u16_at(&bytes, 0));
        }
    }
}
