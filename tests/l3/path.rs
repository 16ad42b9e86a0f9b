//! The path as a person sees it: traceroute shows the gateway nodes; nothing is fragmented on the wire.

use std::net::IpAddr;

use raven_tests::{capture::Capture, privileged, proof};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn traceroute_shows_every_gateway_node() {
    if !privileged("traceroute_shows_every_gateway_node") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let (from, to) = (lab.pod("x-b"), lab.pod("y-b"));
    for target in to.addresses() {
        // Sender's node, its gateway node, the relay, the receiver's gateway node, the receiver's node.
        for (hop, node) in ["x-b", "x-a", "cloud-a", "y-a", "y-b"].iter().enumerate() {
            let said = running.check(from.ns.sh(&format!("ping -c1 -W2 -t {} {target} || true", hop + 1)));
            let router = said.lines().find_map(|l| l.strip_prefix("From ")?.split_whitespace().next()?.parse::<IpAddr>().ok());
            let router = router.unwrap_or_else(|| panic!("hop {} of {target} says nothing: {said}", hop + 1));
            let addresses = running.check(lab.node(node).ns.sh("ip -o addr"));
            assert!(addresses.contains(&format!(" {router}/")), "hop {} is {router}, which is not {node}: {said}", hop + 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_fragmented_on_the_wire() {
    if !privileged("nothing_is_fragmented_on_the_wire") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let fragments = "ip[6:2] & 0x3fff != 0 or ip6 proto 44";
    let wire = running.check(Capture::start(lab.site(), &lab.inet, "wire", fragments).await);
    let lan = running.check(Capture::start(lab.site(), &lab.node("x-b").ns, "eth0", fragments).await);
    for family in 0..2 {
        running.check(proof::bulk(lab, "x-b", "y-b", family, 5_000_000).await);
        running.check(proof::bulk(lab, "y-b", "x-b", family, 5_000_000).await);
    }
    running.check(proof::mtu(lab, "x-b", "y-b").await);
    for capture in [wire, lan] {
        let recording = running.check(capture.stop().await);
        assert_eq!(running.check(recording.lines("")), Vec::<String>::new());
    }
}
