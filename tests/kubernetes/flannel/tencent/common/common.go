// Package common takes the place of Tencent's SDK, which not every module proxy has, and which no test uses. It has
// what flannel's backend for Tencent needs to compile.
package common

func pointer[T any](value T) *T { return &value }

// StringPtr returns a pointer to the value.
func StringPtr(value string) *string { return pointer(value) }

// BoolPtr returns a pointer to the value.
func BoolPtr(value bool) *bool { return pointer(value) }

// StringPtrs returns pointers to the values.
func StringPtrs(values []string) []*string {
	var pointers []*string
	for _, value := range values {
		pointers = append(pointers, pointer(value))
	}
	return pointers
}
