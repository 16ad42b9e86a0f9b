//! From one edge pool to another, through the cloud: a monitor at one site reads a kubelet at another.

use anyhow::ensure;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use raven_tests::{Lab, eventually, privileged};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_at_one_edge_reads_a_kubelet_at_another_through_the_cloud() {
    if !privileged("a_node_at_one_edge_reads_a_kubelet_at_another_through_the_cloud") {
        return;
    }
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    let lab = &running.lab;
    let _server = running.check(running.serve("y-b"));
    running.check(running.answered("y-b").await);
    // The way to the proxy's Service, whose endpoints are addresses of cloud nodes.
    let on = serde_json::json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "raven-agent-config" }, "data": { "forward-node-ip": "true" } });
    let maps: Api<ConfigMap> = Api::namespaced(lab.cluster().client(), raven_api::DEFAULT_NAMESPACE);
    maps.patch("raven-agent-config", &PatchParams::apply("raven-lab"), &Patch::Apply(&on)).await.expect("it is switched on");
    let streams = || running.lab.node("y-a").ns.sh("curl -sS http://[::1]:10265/metrics | grep '^raven_proxy_streams_total '");
    for from in [&lab.node("x-b").ns, &lab.pod("x-b").ns, &lab.node("x-a").ns] {
        let before = running.check(streams());
        let read = || async {
            let text = from.sh("curl -sS -m 5 -H 'Host: y-b:10255' http://10.0.0.11:10264/metrics")?;
            ensure!(text == "of y-b\n", "it says {text:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("{} reads y-b's kubelet by name", from.name), read).await);
        assert_ne!(running.check(streams()), before, "it came by the tunnel of y's gateway node");
        let by_address = || async {
            let text = from.sh("curl -sS -m 5 http://10.2.0.12:10255/metrics")?;
            ensure!(text == "of y-b\n", "it says {text:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("{} reads y-b's kubelet by address", from.name), by_address).await);
    }
}
