// Package errors takes the place of Tencent's SDK; see package common.
package errors

// TencentCloudSDKError is an error of the SDK.
type TencentCloudSDKError struct{}

func (*TencentCloudSDKError) Error() string { return "built without Tencent's SDK" }
