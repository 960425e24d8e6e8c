// objc_msgSend and its kin: look the method up with all argument registers saved, then jump to it.
// A message to nil returns zero. x86-64 is run by the tests; the aarch64 code is written and has
// not been run.

#define UMFA_FUNCTION(name) \
    ".globl " name "\n.hidden " name "\n.type " name ",@function\n" name ":\n"

#if defined(__x86_64__)

#define UMFA_SAVE                                                                  \
    "push %rbp\n mov %rsp,%rbp\n sub $192,%rsp\n"                                  \
    "mov %rdi,(%rsp)\n mov %rsi,8(%rsp)\n mov %rdx,16(%rsp)\n mov %rcx,24(%rsp)\n" \
    "mov %r8,32(%rsp)\n mov %r9,40(%rsp)\n mov %rax,48(%rsp)\n"                    \
    "movups %xmm0,64(%rsp)\n movups %xmm1,80(%rsp)\n movups %xmm2,96(%rsp)\n"      \
    "movups %xmm3,112(%rsp)\n movups %xmm4,128(%rsp)\n movups %xmm5,144(%rsp)\n"   \
    "movups %xmm6,160(%rsp)\n movups %xmm7,176(%rsp)\n"
#define UMFA_RESTORE                                                               \
    "mov %rax,%r11\n"                                                              \
    "mov (%rsp),%rdi\n mov 8(%rsp),%rsi\n mov 16(%rsp),%rdx\n mov 24(%rsp),%rcx\n" \
    "mov 32(%rsp),%r8\n mov 40(%rsp),%r9\n mov 48(%rsp),%rax\n"                    \
    "movups 64(%rsp),%xmm0\n movups 80(%rsp),%xmm1\n movups 96(%rsp),%xmm2\n"      \
    "movups 112(%rsp),%xmm3\n movups 128(%rsp),%xmm4\n movups 144(%rsp),%xmm5\n"   \
    "movups 160(%rsp),%xmm6\n movups 176(%rsp),%xmm7\n leave\n"

asm(".text\n"  //
    UMFA_FUNCTION("objc_msgSend") "test %rdi,%rdi\n jz 1f\n" UMFA_SAVE
                                  "call umfa_objc_lookup\n" UMFA_RESTORE
                                  "jmp *%r11\n"
                                  "1: xor %eax,%eax\n xor %edx,%edx\n xorps %xmm0,%xmm0\n xorps "
                                  "%xmm1,%xmm1\n ret\n"
    // Results in memory: rdi is their address, and the receiver is the second argument. ARC clears
    // the memory itself before it sends to what may be nil.
    UMFA_FUNCTION(
        "objc_msgSend_stret") "test %rsi,%rsi\n jz 1f\n" UMFA_SAVE
                              "mov %rsi,%rdi\n mov %rdx,%rsi\n call umfa_objc_lookup\n" UMFA_RESTORE
                              "jmp *%r11\n"
                              "1: mov %rdi,%rax\n ret\n" UMFA_FUNCTION("objc_msgSendSuper2")
                                  UMFA_SAVE
    "call umfa_objc_lookup_super\n" UMFA_RESTORE
    "mov (%rdi),%rdi\n jmp *%r11\n" UMFA_FUNCTION("objc_msgSendSuper2_stret") UMFA_SAVE
    "mov %rsi,%rdi\n mov %rdx,%rsi\n call umfa_objc_lookup_super\n" UMFA_RESTORE
    "mov (%rsi),%rsi\n jmp *%r11\n"
    ".section .note.GNU-stack,\"\",@progbits\n.text\n");

#elif defined(__aarch64__)

#define UMFA_SAVE                                                                     \
    "stp x29,x30,[sp,#-16]!\n mov x29,sp\n sub sp,sp,#208\n"                          \
    "stp x0,x1,[sp]\n stp x2,x3,[sp,#16]\n stp x4,x5,[sp,#32]\n stp x6,x7,[sp,#48]\n" \
    "str x8,[sp,#64]\n stp q0,q1,[sp,#80]\n stp q2,q3,[sp,#112]\n"                    \
    "stp q4,q5,[sp,#144]\n stp q6,q7,[sp,#176]\n"
#define UMFA_RESTORE                                                                  \
    "mov x16,x0\n"                                                                    \
    "ldp x0,x1,[sp]\n ldp x2,x3,[sp,#16]\n ldp x4,x5,[sp,#32]\n ldp x6,x7,[sp,#48]\n" \
    "ldr x8,[sp,#64]\n ldp q0,q1,[sp,#80]\n ldp q2,q3,[sp,#112]\n"                    \
    "ldp q4,q5,[sp,#144]\n ldp q6,q7,[sp,#176]\n mov sp,x29\n ldp x29,x30,[sp],#16\n"

asm(".text\n"  //
    UMFA_FUNCTION("objc_msgSend") "cbz x0,1f\n" UMFA_SAVE "bl umfa_objc_lookup\n" UMFA_RESTORE
                                  "br x16\n"
                                  "1: mov x1,#0\n movi d0,#0\n movi d1,#0\n movi d2,#0\n movi "
                                  "d3,#0\n ret\n" UMFA_FUNCTION("objc_msgSendSuper2") UMFA_SAVE
    "bl umfa_objc_lookup_super\n" UMFA_RESTORE
    "ldr x0,[x0]\n br x16\n"
    ".section .note.GNU-stack,\"\",%progbits\n.text\n");

#else
#error "the double's objc_msgSend is written for x86-64 and aarch64"
#endif
