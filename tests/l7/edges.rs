//! From one edge pool to another, through the cloud: a monitor at one site reads a kubelet at another.

use anyhow::ensure;
use raven_tests::{Lab, eventually, privileged, proof};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_at_one_edge_reads_a_kubelet_at_another_through_the_cloud() {
    if !privileged("a_node_at_one_edge_reads_a_kubelet_at_another_through_the_cloud") {
        return;
    }
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    let lab = &running.lab;
    running.check(running.serve("y-b").await);
    running.check(running.answered("y-b").await);
    // The way to the proxy's Service, whose endpoints are addresses of cloud nodes.
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    let streams = || proof::metric(&lab.node("y-a").ns, "raven_proxy_streams_total");
    for from in [&lab.node("x-b").ns, &lab.pod("x-b").ns, &lab.node("x-a").ns] {
        let before = running.check(streams().await);
        let read = || async {
            let text = from.sh("curl -sS -m 5 -H 'Host: y-b:10255' http://10.0.0.11:10264/metrics")?;
            ensure!(text == "of y-b\n", "it says {text:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("{} reads y-b's kubelet by name", from.name), read).await);
        assert_ne!(running.check(streams().await), before, "it came by the tunnel of y's gateway node");
        let by_address = || async {
            let text = from.sh("curl -sS -m 5 http://10.2.0.12:10255/metrics")?;
            ensure!(text == "of y-b\n", "it says {text:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("{} reads y-b's kubelet by address", from.name), by_address).await);
    }
}
