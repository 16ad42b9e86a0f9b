//! `forward-node-ip`: nodes of different pools reach each other by their own addresses, too.

use std::time::Duration;

use anyhow::Context;
use raven_tests::{eventually, privileged, probe};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn node_addresses_of_other_pools_are_reached_when_that_is_switched_on_and_not_before() {
    if !privileged("node_addresses_of_other_pools_are_reached_when_that_is_switched_on_and_not_before") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    // From a node and from a pod, to an ordinary node and to a gateway node, both ways, and from edge to edge.
    let pairs = [
        (&lab.node("cloud-b").ns, lab.node("x-b").lan_v4),
        (&lab.pod("cloud-b").ns, lab.node("x-a").lan_v4),
        (&lab.node("x-b").ns, lab.node("cloud-b").lan_v4),
        (&lab.pod("x-b").ns, lab.node("y-b").lan_v4),
    ];
    for (from, to) in pairs {
        let answer = running.check(probe::ping(from, to.into()).await);
        assert_eq!(answer, None, "{to} from {}, before", from.name);
    }
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    for (from, to) in pairs {
        let answers = || async { probe::ping(from, to.into()).await?.context("no answer") };
        running.check(eventually(Duration::from_secs(30), &format!("{to} answers {}", from.name), answers).await);
    }
    // The node's own networks stay what they were: the way to the API server, to the pool's neighbour, to the tunnel's other end.
    for (node, address) in [("cloud-b", "10.0.0.5"), ("cloud-b", "10.0.0.11"), ("x-b", "10.1.0.11"), ("x-a", "198.51.100.10")] {
        let way = running.check(lab.node(node).ns.run("ip", &["route", "get", address]));
        assert!(way.contains("dev eth0"), "{node} to {address}: {way}");
    }
}
