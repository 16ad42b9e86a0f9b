//! Who carries a pool's traffic: elected, replaced, kept, gone.

use anyhow::ensure;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use raven_api::LABEL_GATEWAY;
use serde_json::json;

use crate::stage::{elects, nodes, play, says, status};

#[tokio::test(flavor = "multi_thread")]
async fn the_status_tells_what_the_pool_is_and_whom_it_elected() {
    play("the_status_tells_what_the_pool_is_and_whom_it_elected", async |stage| {
        stage.put_two_pools().await?;
        let _controller = stage.controller("one", &[]).await?;
        stage.two_pools_are_ready().await?;
        let site = stage.gateways.get("site").await?;
        let status = json!(site.status);
        assert_eq!(
            status["nodes"],
            json!([
                {"nodeName": "x-a", "privateIP": "10.1.0.2", "subnets": ["10.244.2.0/24", "fd00:244:2::/64"]},
                {"nodeName": "x-b", "privateIP": "10.1.0.3", "subnets": ["10.244.3.0/24", "fd00:244:3::/64"]},
            ])
        );
        assert_eq!((&status["nodeCount"], &status["observedGeneration"]), (&json!(2), &json!(site.metadata.generation)));
        let endpoint = |node: &str, type_: &str, port: u16, key: &str, on: &str| json!({"nodeName": node, "type": type_, "port": port, "underNAT": true, "config": {key: on}});
        let tunnel = endpoint("x-b", "tunnel", 4500, "enable-l3-tunnel", "true");
        let nodes: Api<Node> = Api::all(stage.lab.cluster().client());
        let uid = nodes.get("x-a").await?.metadata.uid;
        let proxy = |on: &str| {
            let mut proxy = endpoint("x-a", "proxy", 10262, "enable-l7-proxy", on);
            proxy["config"]["node-uid"] = json!(uid);
            proxy
        };
        // No endpoint of type proxy is listed: every node is a candidate, by name.
        assert_eq!(status["activeEndpoints"], json!([tunnel, proxy("true")]));
        let types: Vec<&str> = site.status.iter().flat_map(|s| &s.conditions).map(|c| c.type_.as_str()).collect();
        assert_eq!(types, ["Ready", "Elected", "Accepted"]);
        says(&site, "Ready", "True", "Ready", "2 nodes in the pool, gateway: x-a, x-b")?;
        says(&site, "Elected", "True", "Elected", "tunnel: x-b; proxy: x-a")?;
        says(&site, "Accepted", "True", "Accepted", "in force")?;

        let managers = site.metadata.managed_fields.unwrap_or_default();
        let of_status: Vec<_> = managers.iter().filter(|m| m.subresource.as_deref() == Some("status")).map(|m| (m.manager.as_deref(), m.operation.as_deref())).collect();
        assert_eq!(of_status, [(Some("raven-controller"), Some("Apply"))]);
        let line = stage.lab.cluster().kubectl(&["get", "gw", "site", "--no-headers"])?;
        assert_eq!(line.split_whitespace().take(5).collect::<Vec<_>>(), ["site", "2", "x-b", "True", "Ready"], "{line}");
        assert_eq!(stage.event("site", "GatewayNodeElected", "tunnel: elected x-b").await?, "Normal");

        let configs: Api<ConfigMap> = Api::namespaced(stage.lab.cluster().client(), "kube-system");
        let config = serde_json::from_value(json!({"metadata": {"name": "raven-cfg"}, "data": {"enable-l7-proxy": "false"}}))?;
        configs.create(&PostParams::default(), &config).await?;
        let switched = stage.until("site", "has L7 switched off", |g| says(g, "Ready", "True", "Ready", "ConfigMap raven-cfg sets enable-l7-proxy=false")).await?;
        assert_eq!(json!(switched.status)["activeEndpoints"], json!([tunnel, proxy("false")]));
        configs.delete("raven-cfg", &DeleteParams::default()).await?;
        stage
            .until("site", "has L7 switched on again", |g| {
                let on = json!(g.status)["activeEndpoints"] == status["activeEndpoints"];
                ensure!(on, "the switch is still in force");
                Ok(())
            })
            .await?;
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_elected_node_is_replaced_when_it_falls_silent_and_kept_when_all_do() {
    play("an_elected_node_is_replaced_when_it_falls_silent_and_kept_when_all_do", async |stage| {
        let cluster = stage.lab.cluster();
        stage.put_two_pools().await?;
        let _controller = stage.controller("one", &[]).await?;
        stage.two_pools_are_ready().await?;
        elects(&stage.gateways.get("site").await?, &["x-b"])?;
        let cloud = stage.raw("cloud").await?;

        cluster.set_ready("x-b", false).await?;
        let replaced = stage.until("site", "elects the other node", |g| elects(g, &["x-a"])).await?;
        says(&replaced, "Ready", "True", "Ready", "")?;
        assert_eq!(nodes(&replaced), ["x-a", "x-b"], "it is a node of the pool still");
        assert_eq!(stage.event("site", "GatewayNodeReplaced", "x-a replaces x-b (it is not Ready)").await?, "Normal");

        let before = stage.raw("site").await?;
        cluster.set_ready("x-b", true).await?;
        stage.fence().await?;
        assert_eq!(stage.raw("site").await?, before, "the preferred one is back: no reason to move");

        let elected = status(&stage.gateways.get("site").await?);
        cluster.set_ready("x-b", false).await?;
        cluster.set_ready("x-a", false).await?;
        let dark = stage
            .until("site", "says that no node is ready", |g| says(g, "Elected", "False", "NoReadyNode", "keeping x-a, elected before"))
            .await?;
        says(&dark, "Ready", "False", "NoReadyNode", "keeping x-a, elected before")?;
        assert_eq!((status(&dark).active_endpoints, status(&dark).nodes), (elected.active_endpoints, elected.nodes));
        assert_eq!(stage.event("site", "NoReadyNode", "keeping x-a").await?, "Warning");

        cluster.set_ready("x-b", true).await?;
        let light = stage.until("site", "elects the one that came back", |g| elects(g, &["x-b"])).await?;
        says(&light, "Ready", "True", "Ready", "")?;
        assert_eq!(stage.raw("cloud").await?, cloud, "nothing of this is the cloud's business");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_leaves_takes_its_election_and_its_prefixes_with_it() {
    play("a_node_that_leaves_takes_its_election_and_its_prefixes_with_it", async |stage| {
        stage.put_two_pools().await?;
        let _controller = stage.controller("one", &["--auto-gateways=false"]).await?;
        stage.two_pools_are_ready().await?;
        let cloud = stage.raw("cloud").await?;

        stage.label("x-b", LABEL_GATEWAY, None).await?;
        let left = stage.until("site", "goes on without x-b", |g| elects(g, &["x-a"])).await?;
        assert_eq!((nodes(&left), status(&left).node_count), (vec!["x-a"], 1));
        says(&left, "Accepted", "False", "EndpointNodeUnknown", "node x-b, which is not a node of this pool")?;
        assert_eq!(stage.event("site", "GatewayNodeReplaced", "x-b (it left the pool of site)").await?, "Normal");

        stage.lab.cluster().delete_node("x-a").await?;
        let empty = stage
            .until("site", "has no node", |g| says(g, "Ready", "False", "NoNode", "label its nodes raven.openyurt.io/gateway=site"))
            .await?;
        assert_eq!((nodes(&empty).len(), status(&empty).active_endpoints.len(), status(&empty).node_count), (0, 0, 0));
        says(&empty, "Accepted", "False", "EndpointNodeUnknown", "node x-a, which does not exist")?;
        assert_eq!(stage.event("site", "GatewayNodeLost", "x-a (the node was deleted)").await?, "Warning");

        stage.label("x-b", LABEL_GATEWAY, Some("site")).await?;
        let back = stage.until("site", "elects x-b", |g| elects(g, &["x-b"])).await?;
        assert_eq!(status(&back).nodes[0].subnets, ["10.244.3.0/24", "fd00:244:3::/64"]);
        assert_eq!(stage.raw("cloud").await?, cloud, "the other Gateway is as it was");
        Ok(())
    })
    .await;
}
