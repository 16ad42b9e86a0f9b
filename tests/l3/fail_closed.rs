//! Tests that a packet for another pool leaves through Raven or not at all.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, eventually, probe::Flow, proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn missing_tunnel_device_sends_nothing_unencrypted() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    let internet = proof::record(lab).await.expect("capture the internet");
    let (from, to) = (lab.pod("x-a"), lab.pod("cloud-b"));
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), 500).expect("start the flow");
    let node = &lab.node("x-a").ns;
    for _ in 0..3 {
        // As an engine that is killed: its device is deleted, and with it the device's routes.
        running.check(node.sh("ip link del raven-wg0"));
        let recreated = eventually(Duration::from_secs(60), "the tunnel device is recreated", || async {
            node.sh("ip -4 route show table 9027 dev raven-wg0 | grep -q .").map(drop)
        });
        running.check(recreated.await);
    }
    let (a, b) = (lab.pool("edge-x").clone(), lab.pool("cloud").clone());
    running.check(proof::reach(lab, &a, &b, 0).await.map(drop));
    running.check(flow.stop().await);
    let internet = internet.stop().await.expect("stop the capture");
    running.check(proof::encrypted(lab, &internet).map(drop));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_has_an_unreachable_route_behind_it() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    for node in ["x-a", "x-b", "cloud-b"] {
        for family in ["-4", "-6"] {
            let count = |kind: &str| -> Result<usize> {
                let listed =
                    running.lab.node(node).ns.sh(&format!("ip {family} route show table 9027 type {kind} | wc -l"))?;
                listed.trim().parse().context("a number")
            };
            let (routes, barriers) = (running.check(count("unicast")), running.check(count("unreachable")));
            assert!(routes > 0 && routes == barriers, "{node} {family}: {routes} routes, {barriers} unreachable ones");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_of_another_program_is_not_taken_for_ravens() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    // OpenYurt's Raven leaves this rule behind when it is killed.
    for node in ["x-a", "x-b"] {
        lab.node(node).ns.sh("ip rule add pref 100 fwmark 0x40 lookup 9027").expect("add the rule");
    }
    let running = Running::begin(lab).await.expect("start Raven");
    running.check(proof::converged(&running.lab).await.map(drop));
    let rules = running.check(running.lab.node("x-b").ns.sh("ip rule show pref 100"));
    let result = (|| -> Result<()> {
        ensure!(rules.contains("fwmark 0x40"), "the other rule is missing: {rules}");
        ensure!(rules.lines().any(|rule| !rule.contains("fwmark")), "Raven's rule is missing: {rules}");
        Ok(())
    })();
    running.check(result);
}
