//! Center and site beside those of the release before, by what these sent (`recorded/`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use godwit_transfer::wire::Versions;
use godwit_transfer::{
    Authority, Endpoint, EndpointOptions, Lane, LaneKind, Link, PendingIdentity, Priority,
};
use godwit_types::{Code, Fault, Name, SiteKind, VmId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::verbs::{
    Machines, MigrateSend, MigrateStatus, Ping, Report, Request, SiteReply, SiteRequest, VERBS,
    VmExec, VmStatus,
};
use super::{
    ByteStream, Call, News, RemoteSite, SiteEvent, SiteHost, StreamRequest, bounds, serve,
};

/// What the release before speaks.
const BEFORE: Versions = Versions { min: 1, max: 1 };

/// What is recorded of earlier releases: what each said that those before it did not, by the
/// protocol that it speaks.
const RECORDED: [(u16, &str); 3] = [
    (1, include_str!("recorded/protocol-1.txt")),
    (2, include_str!("recorded/protocol-2.txt")),
    (3, include_str!("recorded/protocol-3.txt")),
];

/// The messages of the first release that is spoken with, by their kinds.
fn recorded() -> BTreeMap<&'static str, Vec<Vec<u8>>> {
    messages(RECORDED[0].1)
}

fn messages(text: &'static str) -> BTreeMap<&'static str, Vec<Vec<u8>>> {
    let mut all = BTreeMap::<_, Vec<_>>::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (kind, hex) = line.rsplit_once(' ').expect("a kind and its bytes");
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
        all.entry(kind).or_default().push((0..hex.len()).step_by(2).map(byte).collect());
    }
    all
}

fn first(kind: &str) -> Vec<u8> {
    recorded().get(kind).unwrap_or_else(|| panic!("no {kind}"))[0].clone()
}

fn read<T: DeserializeOwned>(kind: &str, bytes: &[u8]) -> T {
    let (value, rest) = postcard::take_from_bytes(bytes).unwrap_or_else(|e| panic!("{kind}: {e}"));
    assert!(rest.is_empty(), "{kind}: {} bytes are left", rest.len());
    value
}

/// Reads a message, and sees that it is written as it came.
fn read_and_write<T: DeserializeOwned + Serialize>(kind: &str, bytes: &[u8]) -> T {
    let value = read(kind, bytes);
    assert_eq!(postcard::to_stdvec(&value).expect("bytes"), bytes, "{kind} is written otherwise");
    value
}

#[test]
fn every_message_of_an_earlier_release_is_read_and_written_as_it_was() {
    for (protocol, text) in RECORDED {
        as_it_was(protocol, &messages(text));
    }
}

/// Reads what is recorded of those that were the first to speak `protocol`.
fn as_it_was(protocol: u16, all: &BTreeMap<&'static str, Vec<Vec<u8>>>) {
    let mut verbs = BTreeSet::new();
    for (kind, messages) in all {
        for bytes in messages {
            match kind.split_once(' ') {
                Some(("request", verb)) => {
                    let request: SiteRequest = read_and_write(kind, bytes);
                    assert!(format!("{request:?}").starts_with(&format!("{verb}(")), "{request:?}");
                    assert_eq!(request.since(), protocol, "{verb}");
                    verbs.insert(verb);
                }
                Some(("stream", what)) => {
                    let request: StreamRequest = read_and_write(kind, bytes);
                    assert!(format!("{request:?}").starts_with(what), "{request:?}");
                    assert_eq!(request.since(), protocol, "{what}");
                }
                Some(("news", what)) => match read_and_write(kind, bytes) {
                    SiteEvent::News(news) => assert!(format!("{news:?}").starts_with(what)),
                    other @ SiteEvent::Done(_) => panic!("{other:?}"),
                },
                Some(("reply", what)) => match read_and_write(kind, bytes) {
                    SiteEvent::Done(outcome) => {
                        let reply = outcome.expect("a reply");
                        assert_eq!(reply.label(), what);
                        let checked = bounds::checked(reply.clone()).expect("within its bounds");
                        assert_eq!(checked.label(), what);
                    }
                    other @ SiteEvent::News(_) => panic!("{other:?}"),
                },
                Some(("fault", _)) => match read_and_write(kind, bytes) {
                    SiteEvent::Done(outcome) => drop(outcome.expect_err("a failure")),
                    other @ SiteEvent::News(_) => panic!("{other:?}"),
                },
                None if *kind == "verdict" => {
                    drop(read_and_write::<Result<(), Fault>>(kind, bytes));
                }
                None if *kind == "hello" => {
                    let hello: godwit_transfer::wire::Hello = read_and_write(kind, bytes);
                    assert_eq!(Versions::OURS.agree(hello.versions), Ok(protocol));
                }
                None if *kind == "greeting" => {
                    drop(read_and_write::<godwit_transfer::wire::Greeting>(kind, bytes));
                }
                _ => panic!("a recorded {kind}"),
            }
        }
    }
    let had = VERBS.iter().filter(|(_, since)| *since == protocol).map(|(verb, _)| *verb);
    assert_eq!(verbs, had.collect(), "all that was new in protocol {protocol}, and nothing else");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_site_is_asked_for_what_came_after_its_release() {
    for (protocol, _) in RECORDED {
        let old = Versions { min: 1, max: protocol };
        let (near, far, _endpoints) = linked(Versions::OURS, old).await;
        let remote = RemoteSite::new(far);
        let mut refused = 0;
        let later = RECORDED.iter().filter(|(other, _)| *other > protocol);
        for (kind, message) in later.flat_map(|(_, text)| messages(text)) {
            let fault = match kind.split_once(' ') {
                Some(("request", _)) => {
                    let request = read(kind, &message[0]);
                    remote.answer(request, Call::quiet()).await.expect_err(kind)
                }
                Some(("stream", _)) => {
                    let opened = remote.open(read(kind, &message[0])).await;
                    opened.map(drop).expect_err(kind)
                }
                _ => continue,
            };
            assert_eq!(fault.code, Code::Conflict, "{kind}: {fault}");
            let words = format!("site 'cafe' speaks protocol {protocol}, and '");
            assert!(fault.message.starts_with(&words), "{kind}: {fault}");
            assert_eq!(fault.hint.as_deref(), Some("update 'cafe'"));
            refused += 1;
        }
        // New in 2 are a verb and a stream, in 3 five and one.
        assert_eq!(refused, [8, 6, 0][usize::from(protocol) - 1]);
        let asked = tokio::time::timeout(std::time::Duration::from_millis(50), near.accept_lane());
        assert!(asked.await.is_err(), "a site of protocol {protocol} was asked all the same");
    }
}

proptest::proptest! {
    /// Whatever a peer sends in place of a message is refused or read, and what is read is bounded.
    #[test]
    fn nonsense_is_read_without_harm(
        at in 0..10_000_usize, place in 0..10_000_usize, byte: u8, cut: bool,
        noise in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
    ) {
        let all: Vec<_> = recorded().into_values().flatten().collect();
        let mut bytes = all[at % all.len()].clone();
        let place = place % bytes.len();
        bytes[place] = byte;
        if cut {
            bytes.truncate(place);
        }
        for bytes in [bytes, noise] {
            let _ = postcard::from_bytes::<SiteRequest>(&bytes);
            let _ = postcard::from_bytes::<StreamRequest>(&bytes);
            let _ = postcard::from_bytes::<crate::CenterRequest>(&bytes);
            if let Ok(SiteEvent::Done(outcome)) = postcard::from_bytes(&bytes) {
                let _ = outcome.map_err(bounds::fault).and_then(bounds::checked);
            }
        }
    }
}

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

/// A center and a site of these versions, and their link: the site's end first.
pub(crate) async fn linked(center: Versions, site: Versions) -> (Link, Link, [Endpoint; 2]) {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::create(dir.path()).expect("authority");
    let bind = |who: &str, kind, versions| -> (Endpoint, SocketAddr) {
        let pending = PendingIdentity::make(&name(who), kind).expect("key");
        let der = authority.issue(pending.request(), &name(who), kind).expect("issue");
        let identity = pending.complete(&der, authority.certificate()).expect("identity");
        let (any, trust) = ("127.0.0.1:0".parse().expect("address"), authority.trust().clone());
        let options = EndpointOptions { versions, ..EndpointOptions::default() };
        let bound = Endpoint::bind(any, identity, trust, options).expect("bind");
        let address = bound.local_address().expect("address");
        (bound, address)
    };
    let (center, address) = bind("center", SiteKind::Center, center);
    let (site, _) = bind("cafe", SiteKind::Ap, site);
    let near = site.connect(address, None).await.expect("a link");
    let far = center.accept().await.expect("a link");
    (near, far, [center, site])
}

/// Sends one message as it is, in one piece.
pub(crate) async fn send(lane: &mut Lane, message: &[u8]) {
    lane.send(&[b"\0", message].concat()).await.expect("sent");
}

/// The next message as it came; `None` at the end.
async fn recv(lane: &mut Lane) -> Option<Bytes> {
    let frame = lane.recv().await.expect("a frame")?;
    assert_eq!(frame[0], 0, "it came in one piece");
    Some(frame.slice(1..))
}

/// A site that answers what the release before answered.
#[derive(Default)]
struct Recorded {
    asked: Mutex<Vec<SiteRequest>>,
}

#[async_trait]
impl SiteHost for Recorded {
    fn name(&self) -> &Name {
        static NAME: std::sync::OnceLock<Name> = std::sync::OnceLock::new();
        NAME.get_or_init(|| name("cafe"))
    }
    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault> {
        self.asked.lock().expect("lock").push(request.clone());
        let reply = match request {
            SiteRequest::Report(_) => "reply Report",
            SiteRequest::Machines(_) => "reply Machines",
            SiteRequest::MigrateStatus(_) => "reply MoveStatus",
            SiteRequest::VmExec(_) => "reply Executing",
            SiteRequest::MigrateSend(MigrateSend { next, .. }) => {
                call.news(News::Switched { generation: next });
                "reply Sent"
            }
            _ => "reply Done",
        };
        match read(reply, &first(reply)) {
            SiteEvent::Done(outcome) => *outcome,
            SiteEvent::News(news) => panic!("{news:?}"),
        }
    }
    async fn open(&self, _: StreamRequest) -> Result<ByteStream, Fault> {
        Err(Fault::invalid("no streams"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_answers_the_center_of_the_release_before_in_its_words() {
    let (near, far, _endpoints) = linked(BEFORE, Versions::OURS).await;
    assert_eq!((near.version(), far.version()), (1, 1));
    let site = Arc::new(Recorded::default());
    let served: Arc<dyn SiteHost> = site.clone();
    tokio::spawn(async move { serve(near, &name("center"), served).await });
    let open = async || far.open(LaneKind::Steering, Priority::Control).await.expect("a lane");
    for (verb, reply) in [
        ("Report", "Report"),
        ("Machines", "Machines"),
        ("MigrateStatus", "MoveStatus"),
        ("VmExec", "Executing"),
        ("MigrateSend", "Sent"),
        ("Ping", "Done"),
    ] {
        let request = first(&format!("request {verb}"));
        let mut lane = open().await;
        send(&mut lane, &request).await;
        let mut answer = recv(&mut lane).await.expect("an answer");
        if verb == "MigrateSend" {
            assert_eq!(answer, first("news Switched"), "the commit point");
            answer = recv(&mut lane).await.expect("an answer");
        }
        assert_eq!(answer, first(&format!("reply {reply}")), "{verb}");
        assert!(recv(&mut lane).await.is_none(), "nothing more to {verb}");
        let asked = site.asked.lock().expect("lock").pop().expect("it was asked");
        assert_eq!(postcard::to_stdvec(&asked).expect("bytes"), request);
    }
    // What it does not know, of a center that is newer or none at all, is answered in words.
    for nonsense in [&[200u8, 1][..], &[], &[0xff; 64], b"\x04\x10"] {
        let mut lane = open().await;
        send(&mut lane, nonsense).await;
        let answer = recv(&mut lane).await.expect("an answer");
        let SiteEvent::Done(outcome) = read("an answer", &answer) else { panic!("{answer:?}") };
        let fault = outcome.expect_err("refused");
        assert_eq!(fault.code, Code::Invalid);
        assert!(fault.message.contains("'cafe' does not know"), "{fault}");
    }
    let mut lane = far.open(LaneKind::Pipe, Priority::State).await.expect("a lane");
    send(&mut lane, &[200, 1]).await;
    let verdict: Result<(), Fault> = read("a verdict", &recv(&mut lane).await.expect("a verdict"));
    assert!(verdict.expect_err("refused").message.contains("'cafe' does not know"));
    assert!(site.asked.lock().expect("lock").is_empty(), "nothing of it came through");
    let mut lane = open().await;
    send(&mut lane, &first("request Ping")).await;
    assert_eq!(recv(&mut lane).await.expect("an answer"), first("reply Done"), "the link lives");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_center_asks_a_site_of_the_release_before_for_what_that_has() {
    let (near, far, _endpoints) = linked(Versions::OURS, BEFORE).await;
    let (seen, mut asked) = tokio::sync::mpsc::unbounded_channel();
    // The site of before: it takes requests as they are, and answers as it did.
    let replies = Mutex::new(vec![
        vec![first("news Progress"), first("news Switched"), first("reply Sent")],
        vec![first("reply Machines")],
        vec![first("reply MoveStatus")],
        vec![first("reply Report")],
        vec![vec![7, 7, 7]],
        vec![first("reply Pool")],
        vec![first("reply Done")],
    ]);
    tokio::spawn(async move {
        while let Ok(mut lane) = near.accept_lane().await {
            let request = recv(&mut lane).await.expect("a request");
            seen.send(request).expect("heard");
            let answers = replies.lock().expect("lock").pop().expect("an answer is left");
            for answer in answers {
                send(&mut lane, &answer).await;
            }
            lane.finish().await.expect("the end");
        }
    });
    let remote = RemoteSite::new(far);
    let site: &dyn SiteHost = &remote;
    let mut was_asked = |verb: &str| {
        let request = asked.try_recv().expect("it was asked");
        assert_eq!(request, first(&format!("request {verb}")), "{verb}");
    };
    assert_eq!(site.speaks(), 1);
    site.ask(Ping {}, Call::quiet()).await.expect("there");
    was_asked("Ping");
    // Another reply than belongs to it is not taken for one.
    let fault = site.ask(Ping {}, Call::quiet()).await.expect_err("another kind");
    assert!(fault.message.contains("answered 'ping' with Pool"), "{fault}");
    was_asked("Ping");
    let fault = site.ask(Ping {}, Call::quiet()).await.expect_err("nonsense");
    assert_eq!(fault.code, Code::Damaged, "{fault}");
    was_asked("Ping");
    let report = site.ask(Report {}, Call::quiet()).await.expect("a report");
    assert!(!report.qemu.is_empty());
    was_asked("Report");
    let SiteRequest::MigrateStatus(request) = read("", &first("request MigrateStatus")) else {
        panic!("another verb")
    };
    let status = site.ask::<MigrateStatus>(request, Call::quiet()).await.expect("a status");
    assert!(status.runs || !status.over);
    was_asked("MigrateStatus");

    // It is too old for that, and not asked.
    let vm = VmId::new();
    let fault = site.ask(VmStatus { vm }, Call::quiet()).await.expect_err("too old");
    assert_eq!(fault.code, Code::Conflict);
    assert!(fault.message.contains("'cafe' speaks protocol 1, and 'vm status' needs 2"), "{fault}");
    assert_eq!(fault.hint.as_deref(), Some("update 'cafe'"));
    // The same is known from the list of all.
    assert_eq!(site.machine(vm).await.expect("asked otherwise"), None);
    was_asked(stringify!(Machines));

    let SiteRequest::MigrateSend(request) = read("", &first("request MigrateSend")) else {
        panic!("another verb")
    };
    let news = Arc::new(Mutex::new(Vec::new()));
    let told = news.clone();
    let call = Call::new(move |n| told.lock().expect("lock").push(n), Default::default());
    let next = request.next;
    let sent = site.ask(request, call).await.expect("sent");
    assert!(!sent.is_empty());
    was_asked("MigrateSend");
    let news = news.lock().expect("lock");
    assert!(
        matches!(news.as_slice(), [News::Progress(_), News::Switched { generation }] if *generation == next)
    );
    assert_eq!((VmExec::SINCE, Machines::SINCE, VmStatus::SINCE), (1, 1, 2));
}
