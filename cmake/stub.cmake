# umfa_add_stub(MODULE OUTPUT): OUTPUT, the type stub of an extension module, is made with `all`.
#
# Not nanobind_add_stub, which quotes nothing: it fails in a folder whose name has a parenthesis,
# an apostrophe or any other character that the shell reads.

function(umfa_add_stub module output)
  find_file(UMFA_STUBGEN stubgen.py PATHS ${nanobind_DIR}/.. ${nanobind_DIR}/../src
    NO_DEFAULT_PATH NO_CACHE REQUIRED)
  add_custom_command(OUTPUT ${output}
    COMMAND ${Python_EXECUTABLE} ${UMFA_STUBGEN} -q -i $<TARGET_FILE_DIR:${module}> -m ${module} -o ${output}
    DEPENDS ${module} ${ARGN} ${UMFA_STUBGEN} VERBATIM)
  add_custom_target(${module}_stub ALL DEPENDS ${output})
endfunction()
