//! Links over real UDP on the loopback interface.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use common::{Cloud, Forwarder, name, within};
use godwit_transfer::rpc::{Fault, Router};
use godwit_transfer::{
    Endpoint, EndpointOptions, Expected, JoinError, JoinRefusal, LaneError, LaneKind, LinkError,
    MAX_FRAME, Priority, RpcError, Versions, join,
};
use godwit_types::{Code, CodedError, SiteKind};

const ANY: &str = "127.0.0.1:0";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_joins_by_token_and_its_link_carries_frames_and_calls() {
    let cloud = Cloud::new();
    let (center, address) = cloud.center();
    let token = cloud
        .authority
        .invite(&name("cafe"), SiteKind::Ap, &address.to_string(), 60)
        .expect("invite");
    let identity = within(join(&token)).await.expect("join").identity;
    assert_eq!(identity.name(), &name("cafe"));
    assert_eq!(identity.me().kind, SiteKind::Ap);
    let dir = cloud.dir.path().join("cafe");
    identity.save(&dir).expect("save");
    let identity = godwit_transfer::Identity::load(&dir).expect("load");

    let (ap, _) = cloud.endpoint(identity);
    let link = within(ap.connect(address, Some(&name("center")))).await.expect("connect");
    let far = within(center.accept()).await.expect("accept");
    assert_eq!(link.peer().kind, SiteKind::Center);
    assert_eq!(far.peer().name, name("cafe"));

    let mut lane = link
        .open_about(LaneKind::MemoryBulk, Priority::State, Bytes::from_static(b"job 7"))
        .await
        .expect("open");
    lane.send(&vec![7; MAX_FRAME]).await.expect("the largest frame");
    let mut other = within(far.accept_lane()).await.expect("lane");
    assert_eq!((other.kind(), &other.about()[..]), (LaneKind::MemoryBulk, &b"job 7"[..]));
    assert_eq!(within(other.recv()).await.expect("recv").expect("frame").len(), MAX_FRAME);
    other.send(b"thanks").await.expect("answer");
    assert_eq!(within(lane.recv()).await.expect("recv").expect("frame"), &b"thanks"[..]);

    let router = Router::new()
        .on("double", |_, n: u32| async move { Ok::<_, Fault>(n * 2) })
        .on("who", |peer, ()| async move { Ok::<_, Fault>(peer.name) })
        .on(
            "fail",
            |_, ()| async move { Err::<(), _>(Fault::new(Code::NoRoom, "the pool is full")) },
        )
        .on("slow", |_, ()| std::future::pending::<Result<(), Fault>>());
    let served = far.clone();
    tokio::spawn(async move { served.serve(Arc::new(router)).await });
    let patience = Duration::from_secs(20);
    assert_eq!(link.call::<_, u32>("double", &21u32, patience).await.expect("call"), 42);
    let who: godwit_types::Name = link.call("who", &(), patience).await.expect("call");
    assert_eq!(who, name("cafe"));
    let failed = link.call::<_, ()>("fail", &(), patience).await.expect_err("fails");
    assert_eq!(failed.code(), Code::NoRoom);
    assert!(failed.to_string().contains("the pool is full"), "{failed}");
    let unknown = link.call::<_, ()>("nothing", &(), patience).await.expect_err("fails");
    assert_eq!(unknown.code(), Code::NotFound);
    let late = link.call::<_, ()>("slow", &(), Duration::from_millis(50)).await.expect_err("late");
    assert!(matches!(late, RpcError::TimedOut { .. }), "{late}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_not_good_is_refused_with_its_reason() {
    let cloud = Cloud::new();
    let (_center, address) = cloud.center();
    let invite = |seconds| {
        cloud
            .authority
            .invite(&name("cafe"), SiteKind::Ap, &address.to_string(), seconds)
            .expect("invite")
    };
    let refused = |e: JoinError| match e {
        JoinError::Refused(why) => why,
        other => panic!("not refused by the center: {other:?}"),
    };
    let token = invite(60);
    within(join(&token)).await.expect("the first time");
    let again = within(join(&token)).await.expect_err("the second time");
    assert_eq!(refused(again), JoinRefusal::Used);

    let expired = within(join(&invite(0))).await.expect_err("expired");
    assert_eq!(refused(expired), JoinRefusal::Expired);

    let withdrawn = invite(60);
    cloud.authority.withdraw(&withdrawn.id).expect("withdraw");
    assert_eq!(
        refused(within(join(&withdrawn)).await.expect_err("withdrawn")),
        JoinRefusal::Withdrawn
    );

    let mut forged = invite(60);
    forged.secret = godwit_transfer::keys::Secret::draw();
    let error = within(join(&forged)).await.expect_err("forged");
    assert_eq!(refused(error), JoinRefusal::WrongSecret);

    let mut unknown = invite(60);
    unknown.id = "0000000000000000".into();
    let error = within(join(&unknown)).await.expect_err("unknown");
    assert_eq!(refused(error), JoinRefusal::UnknownToken);

    let mut other = invite(60);
    other.authority = godwit_types::Hash::of(b"another authority");
    let error = within(join(&other)).await.expect_err("another center");
    assert!(matches!(error, JoinError::OtherCenter { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_revoked_sites_and_wrong_names_are_distinguished() {
    let cloud = Cloud::new();
    let (center, address) = cloud.center();

    // The stranger sees first that the center is not of its cloud.
    let elsewhere = Cloud::new();
    let (stranger, _) = elsewhere.endpoint(elsewhere.identity("cafe", SiteKind::Ap));
    let error = within(stranger.connect(address, None)).await.expect_err("a stranger");
    assert!(matches!(error, LinkError::Stranger), "{error:?}");
    // One that trusts this cloud's center, but holds a certificate of another.
    let strange = elsewhere.identity("cafe", SiteKind::Ap);
    let stranger = Endpoint::bind(
        ANY.parse().expect("address"),
        strange,
        cloud.authority.trust().clone(),
        EndpointOptions::default(),
    )
    .expect("bind");
    let error = within(stranger.connect(address, None)).await.expect_err("a stranger");
    assert!(matches!(error, LinkError::WeAreStrange), "{error:?}");

    let (ap, _) = cloud.endpoint(cloud.identity("cafe", SiteKind::Ap));
    let error = within(ap.connect(address, Some(&name("library")))).await.expect_err("wrong name");
    match &error {
        LinkError::WrongName { expected, found } => {
            assert_eq!((expected, found.as_ref()), (&name("library"), Some(&name("center"))));
        }
        other => panic!("{other:?}"),
    }

    // A revocation closes the link that is up, and refuses the next.
    let link = within(ap.connect(address, None)).await.expect("connect");
    let _far = within(center.accept()).await.expect("accept");
    let list = cloud.authority.revoke_site(&name("cafe")).expect("revoke");
    assert_eq!(list.serials.len(), 1);
    let closed = within(link.closed()).await;
    assert!(matches!(closed, LinkError::WeAreRevoked), "{closed:?}");
    let error = within(ap.connect(address, None)).await.expect_err("revoked");
    assert!(matches!(error, LinkError::WeAreRevoked), "{error:?}");
    let kept = godwit_transfer::Authority::open(&cloud.dir.path().join("authority"))
        .expect("open")
        .trust()
        .revocations();
    assert_eq!(*kept, list, "a revocation outlives the center's process");

    // A certificate that ends while its link is up.
    let (short, _) = cloud.endpoint(cloud.identity_for("short", SiteKind::Ap, 2));
    let link = within(short.connect(address, None)).await.expect("connect");
    let _far = within(center.accept()).await.expect("accept");
    let closed = within(link.closed()).await;
    assert!(matches!(closed, LinkError::WeAreExpired), "{closed:?}");

    // A certificate that has ended.
    let ended = cloud.identity_for("bar", SiteKind::Ap, 0);
    let unix = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    while unix().expect("after 1970").as_secs() <= ended.me().not_after {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (ended, _) = cloud.endpoint(ended);
    let error = within(ended.connect(address, None)).await.expect_err("expired");
    assert!(matches!(error, LinkError::WeAreExpired), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_center_answers_where_the_center_should() {
    let cloud = Cloud::new();
    let (ap, _) = cloud.endpoint(cloud.identity("cafe", SiteKind::Ap));
    let known = Expected::Center(Some(name("center")));
    // Sites of this very cloud, a device and one that is called like the center among them.
    for (site, kind) in
        [("bar", SiteKind::Ap), ("phone", SiteKind::Device), ("center", SiteKind::Ap)]
    {
        let (rogue, address) = cloud.endpoint(cloud.identity(site, kind));
        for expected in [&known, &Expected::Center(None)] {
            let error = within(ap.connect_to(address, expected)).await.expect_err("no center");
            assert!(matches!(error, LinkError::NotTheCenter { .. }), "{error:?}");
            let words = error.to_string();
            assert!(words.contains(&format!("{kind} '{site}'")), "{words}");
        }
        rogue.close("done").await;
    }
    // Nor does the center of that authority under another name.
    let (other, address) = cloud.endpoint(cloud.identity("other", SiteKind::Center));
    let error = within(ap.connect_to(address, &known)).await.expect_err("another center");
    assert!(error.to_string().contains("center 'other', not 'center'"), "{error}");
    other.close("done").await;
    let (center, address) = cloud.center();
    within(ap.connect_to(address, &known)).await.expect("the center");
    // Nobody gets a token that would make him one.
    let invite = |site, kind| cloud.authority.invite(&name(site), kind, &address.to_string(), 60);
    assert!(invite("second", SiteKind::Center).is_err());
    assert!(invite("center", SiteKind::Ap).is_err());
    center.close("done").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_are_negotiated_or_refused_in_words() {
    let cloud = Cloud::new();
    let (_center, address) = cloud.center();
    let bind = |versions| {
        Endpoint::bind(
            ANY.parse().expect("address"),
            cloud.identity("cafe", SiteKind::Ap),
            cloud.authority.trust().clone(),
            EndpointOptions { versions, ..EndpointOptions::default() },
        )
        .expect("bind")
    };
    let speaks = async |versions| {
        let link = within(bind(versions).connect(address, None)).await;
        link.expect("connect").version()
    };
    let Versions { max, .. } = Versions::OURS;
    assert_eq!(speaks(Versions { min: 1, max: 1 }).await, 1, "the release of before");
    assert_eq!(speaks(Versions { min: 1, max: max + 1 }).await, max, "the one to come");
    assert_eq!(speaks(Versions { min: 1, max: u16::MAX }).await, max);
    for nonsense in [Versions { min: 2, max: 1 }, Versions { min: 0, max: 0 }] {
        let error = within(bind(nonsense).connect(address, None)).await.expect_err("nonsense");
        assert!(error.to_string().contains("no range"), "{error}");
    }
    let far_ahead = bind(Versions { min: 8, max: 9 });
    let error = within(far_ahead.connect(address, None)).await.expect_err("no common version");
    assert!(error.to_string().contains("no common protocol version"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversized_frame_is_not_sent_and_the_lane_stays_good() {
    let cloud = Cloud::new();
    let (near, far) = cloud.pair().await;
    let mut lane = near.open(LaneKind::Pipe, Priority::Bulk).await.expect("open");
    let error = lane.send(&vec![0; MAX_FRAME + 1]).await.expect_err("too long");
    assert!(matches!(error, LaneError::Wire(_)), "{error:?}");
    lane.send(b"the lane is still good").await.expect("send");
    let mut other = within(far.accept_lane()).await.expect("lane");
    assert!(within(other.recv()).await.expect("recv").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_survives_five_seconds_without_a_single_packet() {
    let cloud = Cloud::new();
    let (center, address) = cloud.center();
    let forwarder = Forwarder::start(address, 1000.0, Duration::from_millis(1)).await;
    let (ap, _) = cloud.endpoint(cloud.identity("cafe", SiteKind::Ap));
    let near = within(ap.connect(forwarder.address, None)).await.expect("connect");
    let far = within(center.accept()).await.expect("accept");
    let mut lane = near.open(LaneKind::Steering, Priority::Control).await.expect("open");
    lane.send(b"before").await.expect("send");
    let mut other = within(far.accept_lane()).await.expect("lane");
    assert_eq!(within(other.recv()).await.expect("recv").expect("frame"), &b"before"[..]);
    forwarder.cut(true);
    lane.send(b"into the void").await.expect("buffered");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(near.close_reason().is_none() && far.close_reason().is_none());
    forwarder.cut(false);
    assert_eq!(within(other.recv()).await.expect("recv").expect("frame"), &b"into the void"[..]);
    other.send(b"and back").await.expect("send");
    assert_eq!(within(lane.recv()).await.expect("recv").expect("frame"), &b"and back"[..]);
    assert!(forwarder.dropped() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_demanded_frame_does_not_wait_behind_bulk() {
    const PIECE: usize = 64 << 10;
    let cloud = Cloud::new();
    let (center, address) = cloud.center();
    let forwarder = Forwarder::start(address, 40.0, Duration::from_millis(5)).await;
    let (ap, _) = cloud.endpoint(cloud.identity("cafe", SiteKind::Ap));
    let near = within(ap.connect(forwarder.address, None)).await.expect("connect");
    let far = within(center.accept()).await.expect("accept");
    let open = async |kind: LaneKind| {
        let mut lane = near.open(kind, kind.usual_priority()).await.expect("open");
        lane.send(b"here").await.expect("send");
        let mut other = within(far.accept_lane()).await.expect("lane");
        assert_eq!(other.kind(), kind);
        assert!(within(other.recv()).await.expect("recv").is_some());
        (lane, other)
    };
    for (bulk, demand) in
        [(LaneKind::MemoryBulk, LaneKind::MemoryDemand), (LaneKind::DiskBulk, LaneKind::DiskDemand)]
    {
        let (mut bulk, mut taken) = open(bulk).await;
        let (mut demand, mut asked) = open(demand).await;
        let (arrived, left) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        // More than the link holds is always waiting to be sent.
        let sent = Arc::clone(&left);
        let sender = tokio::spawn(async move {
            while bulk.send(&[7; PIECE]).await.is_ok() {
                sent.fetch_add(1, SeqCst);
            }
        });
        let got = Arc::clone(&arrived);
        let receiver = tokio::spawn(async move {
            while let Ok(Some(_)) = taken.recv().await {
                got.fetch_add(1, SeqCst);
            }
        });
        let waiting = || (left.load(SeqCst) - arrived.load(SeqCst)) * PIECE;
        for round in 0..4 {
            within(async {
                while waiting() < 6 << 20 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
            let (behind, before) = (waiting(), arrived.load(SeqCst));
            demand.send(b"this page, now").await.expect("send");
            assert!(within(asked.recv()).await.expect("recv").is_some());
            let first = (arrived.load(SeqCst) - before) * PIECE;
            // Only what is in flight already comes first.
            assert!(first * 2 < behind, "round {round}: {first} bytes first, of {behind}");
        }
        sender.abort();
        receiver.abort();
    }
}
