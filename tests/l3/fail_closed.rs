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

/// Objects of OpenYurt's Raven, and a chain of another program beside them.
const LEFTOVERS: &str = "
    ip rule add pref 100 fwmark 0x40 lookup 9027
    ip rule add pref 101 lookup 9028
    ip route add 10.244.99.0/24 dev lo table 9028
    ipset create raven-mark-set hash:net
    ipset create raven-skip-nat-set hash:net
    iptables -t mangle -N RAVEN-MARK-CHAIN
    iptables -t mangle -A RAVEN-MARK-CHAIN -m set --match-set raven-mark-set dst -j MARK --set-mark 0x40
    iptables -t mangle -N OTHER-CHAIN
    iptables -t mangle -A PREROUTING -m comment --comment 'raven mark' -j RAVEN-MARK-CHAIN
    iptables -t mangle -A PREROUTING -j OTHER-CHAIN
    iptables -t mangle -A OUTPUT -j RAVEN-MARK-CHAIN
    iptables -t nat -N RAVEN-POSTROUTING
    iptables -t nat -A RAVEN-POSTROUTING -m set --match-set raven-skip-nat-set src -j ACCEPT
    iptables -t nat -A POSTROUTING -j RAVEN-POSTROUTING
";

#[tokio::test(flavor = "multi_thread")]
async fn rule_of_another_program_is_not_taken_for_ravens() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    // What OpenYurt's Raven leaves behind when it is killed.
    for node in ["x-a", "x-b"] {
        lab.node(node).ns.sh(LEFTOVERS).expect("set up the leftovers");
    }
    let mut running = Running::begin(lab).await.expect("start Raven");
    running.check(proof::converged(&running.lab).await.map(drop));
    let rules = running.check(running.lab.node("x-b").ns.sh("ip rule show pref 100"));
    let result = (|| -> Result<()> {
        ensure!(rules.contains("fwmark 0x40"), "the other rule is missing: {rules}");
        ensure!(rules.lines().any(|rule| !rule.contains("fwmark")), "Raven's rule is missing: {rules}");
        Ok(())
    })();
    running.check(result);

    // A flag removes them; the rest of the tables stays.
    let log = running.agent("x-a").process.output().expect("read the log");
    assert!(log.contains("ipset raven-skip-nat-set") && log.contains("--adopt"), "{log}");
    let agent = running.agent("x-b");
    agent.arguments.push("--adopt".to_owned());
    agent.restart().expect("restart the agent");
    let node = &running.lab.node("x-b").ns;
    let removed = || async {
        let left =
            node.sh("ip rule; ip route show table 9028; ipset list -n; iptables-save -t mangle; iptables-save -t nat")?;
        ensure!(!["0x40", "9028", "raven-skip", "raven-mark", "RAVEN-"].iter().any(|l| left.contains(l)), "{left}");
        ensure!(left.contains("OTHER-CHAIN") && left.contains("-A PREROUTING -j OTHER-CHAIN"), "{left}");
        ensure!(left.contains("lookup 9027"), "Raven's rule is missing: {left}");
        Ok(())
    };
    running.check(eventually(Duration::from_secs(30), "the leftovers are removed", removed).await);
    let (a, b) = (running.lab.pool("edge-x").clone(), running.lab.pool("cloud").clone());
    running.check(proof::reach(&running.lab, &a, &b, 0).await.map(drop));
}
