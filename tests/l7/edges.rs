//! Tests of requests from one edge pool to another through the cloud, such as those of a monitoring system at a site.

use anyhow::ensure;
use raven_tests::{Lab, eventually, proof, require_root};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn edge_node_reaches_kubelet_at_another_edge() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    let lab = &running.lab;
    running.check(running.serve("y-b").await);
    running.check(running.answered("y-b").await);
    // Makes the endpoints of the proxy's Service reachable, which are addresses of cloud nodes.
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    let streams = || proof::metric(&lab.node("y-a").ns, "raven_proxy_streams_total");
    for from in [&lab.node("x-b").ns, &lab.pod("x-b").ns, &lab.node("x-a").ns] {
        let before = running.check(streams().await);
        let read = || async {
            let text = from.sh("curl -sS -m 5 -H 'Host: y-b:10255' http://10.0.0.11:10264/metrics")?;
            ensure!(text == "of y-b\n", "unexpected answer {text:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("{} reads y-b's kubelet by name", from.name), read).await);
        assert_ne!(running.check(streams().await), before, "the request must use a proxy stream of y's gateway node");
        let by_address = || async {
            let text = from.sh("curl -sS -m 5 http://10.2.0.12:10255/metrics")?;
            ensure!(text == "of y-b\n", "unexpected answer {text:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("{} reads y-b's kubelet by address", from.name), by_address).await);
    }
}
