//! Links that stall or die: a stream outlives a short stall, new requests avoid a dead connection at once, and an idle
//! site costs little on a metered link.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, Namespace, eventually, meter::Meter, patience, proof, require_root};

use crate::{Running, SOON};

/// A dead link is noticed within this time while a stream is open: the requirement, and a pause between two looks.
const NOTICED: Duration = Duration::from_millis(5_000 + 300);
/// Bytes that an idle site may cost in a month, L3 and L7 together.
const MONTH: f64 = 60e6;
/// The longest interval of what an idle site sends, the HTTP/2 pings: a shorter window has one too many or too few.
const WINDOW: Duration = Duration::from_secs(300);

/// A site's link that loses every packet, until it is dropped.
struct Cut<'a>(&'a Namespace);

impl<'a> Cut<'a> {
    fn new(router: &'a Namespace) -> Result<Self> {
        router.nft("table inet cut { chain forward { type filter hook forward priority 0; drop; }; }")?;
        Ok(Self(router))
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        let _ = self.0.sh("nft delete table inet cut");
    }
}

impl Running {
    /// An agent's proxy connections, as it lists them.
    fn connections(&self, node: &str) -> Result<Vec<serde_json::Value>> {
        let listed = self.lab.node(node).ns.sh("curl -sS http://[::1]:10265/connections")?;
        Ok(listed.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }

    /// The state of an agent's proxy connections that have streams.
    fn busy_connections(&self, node: &str) -> Result<Vec<String>> {
        let lines = self.connections(node)?;
        let busy = lines.iter().filter(|line| line["streams"] != 0);
        Ok(busy.filter_map(|line| line["state"].as_str().map(str::to_owned)).collect())
    }

    /// The numbers of the cloud's connections with edge-x.
    fn numbers(&self) -> Result<BTreeSet<u64>> {
        let lines = self.connections("cloud-a")?;
        let of_site = lines.iter().filter(|line| line["gateway"] == "edge-x");
        Ok(of_site.filter_map(|line| line["connection"].as_u64()).collect())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_outlives_a_stall_and_new_requests_avoid_it() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    running.check(running.serve("x-b").await);
    running.check(running.answered("x-b").await);

    let mut client = running.lab.node("cloud-b").ns.command("busybox");
    client.args(["nc", "10.1.0.12", "10255"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = client.spawn().expect("start nc");
    let mut input = client.stdin.take().expect("standard input is a pipe");
    input.write_all(b"GET /met").expect("write to nc");
    let open = || async {
        for node in ["cloud-a", "x-a"] {
            ensure!(running.busy_connections(node)?.len() == 1, "{node} has no stream");
        }
        Ok(())
    };
    running.check(eventually(SOON, "the stream is open", open).await);

    // Longer than a short stall, shorter than the streams' patience.
    let router = &running.lab.pool("edge-x").router;
    let end = tokio::time::Instant::now() + Duration::from_secs(12);
    let cut = running.check(Cut::new(router));
    let begin = Instant::now();
    for node in ["cloud-a", "x-a"] {
        let silent = || async {
            let states = running.busy_connections(node)?;
            ensure!(states == ["silent"], "{node}: {states:?}");
            Ok(())
        };
        running.check(eventually(SOON, "the dead link is noticed", silent).await);
        println!("{node} noticed the dead link after {} ms", begin.elapsed().as_millis());
        assert!(begin.elapsed() < NOTICED.mul_f64(patience()), "{node}: {:?}", begin.elapsed());
    }
    tokio::time::sleep_until(end).await;
    drop(cut);
    let new = running.check(running.answered("x-b").await);
    println!("a new request is answered {} ms after the end of the stall", new.as_millis());

    // The open stream continues. The kernel's next retransmission comes after at most the length of the stall.
    input.write_all(b"rics HTTP/1.0\r\nHost: x-b:10255\r\n\r\n").expect("write to nc");
    let mut answer = String::new();
    client.stdout.take().expect("standard output is a pipe").read_to_string(&mut answer).expect("read from nc");
    let _ = client.wait();
    assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    assert!(answer.ends_with("of x-b\n"), "{answer:?}");
}

/// The cloud does not know that the site has lost its connections, and must not use them for requests.
#[tokio::test(flavor = "multi_thread")]
async fn lost_connections_are_removed_when_the_site_dials_again() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    let both = || async {
        let numbers = running.numbers()?;
        ensure!(numbers.len() == 2, "{numbers:?}");
        Ok(numbers)
    };
    let before = running.check(eventually(SOON, "the proxy connections exist", both).await);
    let cut = running.check(Cut::new(&running.lab.pool("edge-x").router));
    let lost = || async {
        let left = running.connections("x-a")?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    };
    running.check(eventually(SOON, "the idle site has noticed the dead link", lost).await);
    // It has closed at most the first one, which it checked when the second was established.
    let kept = running.check(running.numbers());
    assert!(!kept.is_empty() && kept.is_subset(&before), "the cloud has not noticed it: {kept:?}");
    drop(cut);
    let replaced = || async {
        let numbers = running.numbers()?;
        ensure!(numbers.len() == 2 && numbers.is_disjoint(&before), "{numbers:?}");
        Ok(())
    };
    running.check(eventually(SOON, "the cloud has only the new connections", replaced).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_site_costs_little() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    let both = || async {
        for node in ["x-a", "y-a"] {
            let connections = proof::metric(
                &running.lab.node(node).ns,
                "raven_proxy_connections{gateway=\"cloud\",node=\"cloud-a\"}",
            );
            ensure!(connections.await?.context("no metric")? == 2, "{node} is not connected");
        }
        Ok(())
    };
    running.check(eventually(SOON, "the proxy connections exist", both).await);
    running.check(proof::converged(&running.lab).await);
    let router = &running.lab.pool("edge-x").router;
    let [tunnel, proxy] = [4500, 10262].map(|port| running.check(Meter::of_port(router, port)));
    let (tunnel, proxy) = tokio::join!(tunnel.month(WINDOW), proxy.month(WINDOW));
    let (tunnel, proxy) = (running.check(tunnel), running.check(proxy));
    println!("an idle site costs {:.1} MB a month for L3 and {:.1} MB for L7", tunnel / 1e6, proxy / 1e6);
    assert!(tunnel + proxy < MONTH, "{tunnel} and {proxy} bytes");
    assert!(tunnel > 1e6 && proxy > 1e6, "{tunnel} and {proxy} bytes: too little, so the meters do not work");
}
