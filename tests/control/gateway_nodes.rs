//! Tests of GatewayNodes: those of removed nodes do not stay.

use anyhow::ensure;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use raven_api::{GatewayNode, LABEL_GATEWAY};
use raven_tests::{eventually, test_name};
use serde_json::json;

use crate::fixture::{SOON, run};

#[tokio::test(flavor = "multi_thread")]
async fn gateway_node_is_deleted_with_its_node() {
    run(test_name!(), async |fixture| {
        let client = fixture.lab.cluster().client();
        let gateway_nodes: Api<GatewayNode> = Api::all(client.clone());
        for (name, number) in [("c-a", 1), ("c-b", 2)] {
            fixture.put_node(name, number, &[(LABEL_GATEWAY, "cloud")]).await?;
        }
        // The Node of c-x was removed while no controller ran.
        for name in ["c-a", "c-b", "c-x"] {
            let object = json!({
                "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode",
                "metadata": {"name": name}, "spec": {"gateway": "cloud"},
            });
            gateway_nodes.patch(name, &PatchParams::apply("an-agent"), &Patch::Apply(&object)).await?;
        }
        let before = gateway_nodes.get("c-a").await?;
        let _controller = fixture.controller("one", &[]).await?;
        let until = async |expected: &[&str]| {
            eventually(SOON, "only GatewayNodes of existing nodes exist", async || {
                let list = gateway_nodes.list(&Default::default()).await?;
                let names: Vec<_> = list.items.iter().filter_map(|node| node.metadata.name.as_deref()).collect();
                ensure!(names == expected, "{names:?}");
                Ok(())
            })
            .await
        };
        until(&["c-a", "c-b"]).await?;
        Api::<Node>::all(client.clone()).delete("c-b", &DeleteParams::default()).await?;
        until(&["c-a"]).await?;
        assert_eq!(gateway_nodes.get("c-a").await?.metadata.uid, before.metadata.uid, "c-a must not be recreated");
        Ok(())
    })
    .await;
}
